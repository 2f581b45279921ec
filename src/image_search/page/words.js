// The page in the language that the browser asks for. Words stand in English where they are used; here are the others.

const VIETNAMESE = {
  "Composed image retrieval": "Tìm ảnh bằng ảnh và lời",
  "Question": "Câu hỏi",
  "What to look for, or to change of the reference": "Tìm gì, hoặc đổi gì ở ảnh gốc (tiếng Anh là chắc nhất)",
  "is red, no sleeves": "is red, no sleeves",
  "Search": "Tìm",
  "Paper": "Bài báo",
  "Code": "Mã nguồn",
  "Upload": "Tải lên",
  "Or drop images on the page, or paste them": "Hoặc thả ảnh vào trang, hoặc dán ảnh",
  "Undo": "Hoàn tác",
  "Start over": "Làm lại từ đầu",
  "How to search": "Cách tìm",
  "Ask with": "Hỏi bằng",
  "sum of image and text": "tổng của ảnh và lời",
  "sum, as trained": "tổng, như khi huấn luyện",
  "image only": "chỉ ảnh",
  "text only": "chỉ lời",
  "side by side": "đặt cạnh nhau",
  "Text in the sum:": "Phần của lời trong tổng:",
  "Image or text:": "Ảnh hay lời:",
  "as trained": "như khi huấn luyện",
  "towards the image": "nghiêng về ảnh",
  "towards the text": "nghiêng về lời",
  "Leave references out of the results": "Bỏ ảnh gốc khỏi kết quả",
  "Only images where": "Chỉ những ảnh mà",
  "Steps so far": "Các bước đã qua",
  "Try one whose answer is known": "Thử một câu đã biết đáp án",
  "References to start from": "Ảnh gốc để bắt đầu",
  "Other images": "Ảnh khác",
  "Answers": "Kết quả",
  "Save as": "Lưu",
  "Save as JSON": "Lưu JSON",
  "Save as PNG": "Lưu PNG",
  "Save as SVG": "Lưu SVG",
  "Why these answers": "Vì sao có kết quả này",
  "Path has": "Đường dẫn có",
  "Only answers whose path has this": "Chỉ kết quả có đường dẫn chứa chữ này",
  "More answers": "Thêm kết quả",
  "Reference": "Ảnh gốc",
  "References": "Các ảnh gốc",
  "Use as reference": "Dùng làm ảnh gốc",
  "Add as reference": "Thêm làm ảnh gốc",
  "Add as reference: {0}": "Thêm làm ảnh gốc: {0}",
  "Add a reference: upload it, or drop or paste it here": "Thêm ảnh gốc: tải lên, hoặc thả hay dán vào đây",
  "Mean of {0} references": "Trung bình của {0} ảnh gốc",
  "Remove {0}": "Bỏ {0}",
  "at most {0} references: remove one to add another": "tối đa {0} ảnh gốc: hãy bỏ một ảnh để thêm ảnh khác",
  "Previous": "Trước",
  "Next": "Sau",
  "Arrow left": "Phím trái",
  "Arrow right": "Phím phải",
  "More like this": "Giống ảnh này",
  "Less like this": "Bớt giống ảnh này",
  "Less like it": "Bớt giống nó",
  "Look less like the reference, and choose another": "Bớt giống ảnh gốc này, rồi chọn ảnh khác",
  "Less like {0}": "Bớt giống {0}",
  "Less like": "Bớt giống",
  "This is what I look for": "Đây là ảnh tôi tìm",
  "I look for this no more": "Tôi không tìm ảnh này nữa",
  "Forget it": "Bỏ",
  "Copy path": "Chép đường dẫn",
  "Copied": "Đã chép",
  "Download": "Tải về",
  "Close": "Đóng",
  "Load again": "Tải lại trang",
  "Combiner": "Combiner",
  "Sum": "Tổng",
  "Image only": "Chỉ ảnh",
  "Text only": "Chỉ lời",
  "Searching": "Đang tìm",
  "Sending…": "Đang gửi…",
  "No reference: choose an image, upload or paste one, or drop it here. Or search by words alone.":
    "Chưa có ảnh gốc: chọn, tải lên, dán hoặc thả ảnh vào đây. Hoặc chỉ tìm bằng lời.",
  "No reference": "Chưa có ảnh gốc",
  "type what to look for, or choose an image": "gõ điều cần tìm, hoặc chọn một ảnh",
  "Reference: {0}": "Ảnh gốc: {0}",
  "References: {0}": "Các ảnh gốc: {0}",
  "{0} with a {1} · {2} images": "{0} cùng {1} · {2} ảnh",
  "{0} · {1} images": "{0} · {1} ảnh",
  "{0} of {1} images, {2} ms": "{0} trên {1} ảnh, {2} ms",
  "{0} answers, {1}": "{0} kết quả, {1}",
  "{0} of {1}": "{0} trên {1}",
  "{0} of the nearest {1}": "{0} trong {1} ảnh gần nhất",
  "{0} of {1}, {2}": "{0} trên {1}, {2}",
  "Answer {0}: {1}": "Kết quả {0}: {1}",
  "Open answer {0} large: {1}": "Mở lớn kết quả {0}: {1}",
  "Go on from it": "Đi tiếp từ ảnh này",
  "Open large": "Mở lớn",
  "Image {0} of {1}: {2}": "Ảnh {0} trên {1}: {2}",
  "Example: {0}, “{1}”": "Ví dụ: {0}, “{1}”",
  "more like this": "giống ảnh này",
  "Back to: {0}": "Trở lại: {0}",
  "Place {0}, {1}, similarity {2}": "Hạng {0}, {1}, độ giống {2}",
  "The target is at place {0} of {1}": "Ảnh cần tìm đứng thứ {0} trên {1}",
  "The target is not among the first {0}": "Ảnh cần tìm không nằm trong {0} ảnh đầu",
  "The results follow your words to {0} % and the reference to {1} %.":
    "Kết quả theo lời của bạn {0} % và theo ảnh gốc {1} %.",
  "The results follow your words to {0} % and the references to {1} %.":
    "Kết quả theo lời của bạn {0} % và theo các ảnh gốc {1} %.",
  "{0} of {1} experts worked on this question. The others rest: every question goes to the {0} that suit it best.":
    "{0} trong {1} chuyên gia làm việc với câu hỏi này. Số còn lại nghỉ: mỗi câu hỏi chỉ đến {0} chuyên gia hợp nhất.",
  "Asked with the image only: your words were not used.": "Chỉ hỏi bằng ảnh: lời của bạn không được dùng.",
  "Asked with the text only: no reference was used.": "Chỉ hỏi bằng lời: ảnh gốc không được dùng.",
  "your words": "lời của bạn",
  "expert {0}": "chuyên gia {0}",
  "rests": "nghỉ",
  "Idle, as no question went to them when they were measured: experts {0}.":
    "Không làm việc, vì khi đo không câu hỏi nào đến: chuyên gia {0}.",
  "The server was restarted: its images may have other numbers now.":
    "Máy chủ đã khởi động lại: số của các ảnh có thể đã đổi.",
  "the server does not answer: see whether it runs, then try again":
    "máy chủ không trả lời: xem nó có đang chạy không, rồi thử lại",
  "the server answers {0}: load the page again": "máy chủ trả lời {0}: tải lại trang",
  "the uploaded image is not part of a link: upload it again":
    "liên kết không chứa ảnh đã tải lên: hãy tải lên lần nữa",
  "only files and images of this page are taken: nothing is fetched from an address":
    "chỉ nhận tệp và ảnh của trang này: không lấy gì từ một địa chỉ",
  "the browser does not let the page copy: the path is selected, copy it by Ctrl+C":
    "trình duyệt không cho trang chép: đường dẫn đã được chọn, hãy chép bằng Ctrl+C",
  "the link names an image that the index does not have: choose another":
    "liên kết nêu một ảnh không có trong chỉ mục: hãy chọn ảnh khác",
  "this index takes no filter: the link's was left out": "chỉ mục này không nhận bộ lọc: đã bỏ bộ lọc của liên kết",
};

const isVietnamese = navigator.language.toLowerCase().startsWith("vi");

// A text in the visitor's language, with values in place of {0}, {1} and so on.
export function t(text, ...values) {
  const said = (isVietnamese && VIETNAMESE[text]) || text;
  return said.replace(/\{(\d)\}/g, (_, place) => values[place]);
}

export const grouped = (value) => value.toLocaleString(isVietnamese ? "vi" : "en");

// Puts what stands in the page's HTML into the visitor's language.
export function translate() {
  if (!isVietnamese) return;
  document.documentElement.lang = "vi";
  const texts = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim();
    if (VIETNAMESE[text]) texts.currentNode.data = texts.currentNode.data.replace(text, VIETNAMESE[text]);
  }
  for (const name of ["placeholder", "title", "aria-label"]) {
    for (const shown of document.querySelectorAll(`[${name}]`)) shown.setAttribute(name, t(shown.getAttribute(name)));
  }
}
