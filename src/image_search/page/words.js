// Translations of the page. The English text, which the code contains, is the key; the browser determines the language.

const VIETNAMESE = {
  "Composed image retrieval": "Tìm ảnh bằng ảnh và lời",
  "Query": "Truy vấn",
  "What to look for, or what to change": "Tìm gì, hoặc đổi gì ở ảnh gốc (tiếng Anh là chắc nhất)",
  "is red, no sleeves": "is red, no sleeves",
  "Search": "Tìm",
  "Paper": "Bài báo",
  "Code": "Mã nguồn",
  "Upload": "Tải lên",
  "Or drop images on the page, or paste them": "Hoặc thả ảnh vào trang, hoặc dán ảnh",
  "Undo": "Hoàn tác",
  "Start over": "Làm lại từ đầu",
  "How to search": "Cách tìm",
  "Search with": "Tìm bằng",
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
  "Try an example with a known target": "Thử một ví dụ đã biết ảnh cần tìm",
  "References to start from": "Ảnh gốc để bắt đầu",
  "Other images": "Ảnh khác",
  "Results": "Kết quả",
  "Save as": "Lưu",
  "Save as JSON": "Lưu JSON",
  "Save as PNG": "Lưu PNG",
  "Save as SVG": "Lưu SVG",
  "Why these results": "Vì sao có kết quả này",
  "Path contains": "Đường dẫn chứa",
  "Show only results whose path contains this text": "Chỉ hiện kết quả có đường dẫn chứa chữ này",
  "More results": "Thêm kết quả",
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
  "Mark as target": "Đánh dấu là ảnh cần tìm",
  "Remove target": "Bỏ ảnh cần tìm",
  "Remove": "Bỏ",
  "Copy path": "Chép đường dẫn",
  "Copied": "Đã chép",
  "Download": "Tải về",
  "Close": "Đóng",
  "Reload": "Tải lại trang",
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
  "{0} results, {1}": "{0} kết quả, {1}",
  "{0} of {1}": "{0} trên {1}",
  "{0} of the nearest {1}": "{0} trong {1} ảnh gần nhất",
  "Result {0}: {1}": "Kết quả {0}: {1}",
  "Enlarge result {0}: {1}": "Phóng to kết quả {0}: {1}",
  "Continue from this result": "Đi tiếp từ ảnh này",
  "Enlarge": "Phóng to",
  "Image {0} of {1}: {2}": "Ảnh {0} trên {1}: {2}",
  "Example: {0}, “{1}”": "Ví dụ: {0}, “{1}”",
  "more like this": "giống ảnh này",
  "Back to: {0}": "Trở lại: {0}",
  "Rank {0}, {1}, similarity {2}": "Thứ hạng {0}, {1}, độ tương đồng {2}",
  "The target is at rank {0} of {1}": "Thứ hạng của ảnh cần tìm: {0} trên {1}",
  "The target is not among the first {0}": "Ảnh cần tìm không nằm trong {0} ảnh đầu",
  "The results follow your words to {0} % and the reference to {1} %.":
    "Kết quả theo lời của bạn {0} % và theo ảnh gốc {1} %.",
  "The results follow your words to {0} % and the references to {1} %.":
    "Kết quả theo lời của bạn {0} % và theo các ảnh gốc {1} %.",
  "{0} of {1} experts worked on this query. The others rest: every query is routed to the {0} that suit it best.":
    "{0} trong {1} chuyên gia xử lý truy vấn này. Số còn lại nghỉ: mỗi truy vấn chỉ đến {0} chuyên gia hợp nhất.",
  "Searched with the image only: your text was not used.": "Chỉ tìm bằng ảnh: lời của bạn không được dùng.",
  "Searched with the text only: no reference was used.": "Chỉ tìm bằng lời: ảnh gốc không được dùng.",
  "your words": "lời của bạn",
  "expert {0}": "chuyên gia {0}",
  "rests": "nghỉ",
  "Idle, because no query was routed to them when they were measured: experts {0}.":
    "Không làm việc, vì khi đo không truy vấn nào đến: chuyên gia {0}.",
  "The server was restarted: its images may have different numbers now.":
    "Máy chủ đã khởi động lại: số của các ảnh có thể đã đổi.",
  "the server does not respond: check that it is running, then try again":
    "máy chủ không trả lời: xem nó có đang chạy không, rồi thử lại",
  "the server responded with status {0}: reload the page": "máy chủ trả về mã {0}: tải lại trang",
  "a link does not contain uploaded images: upload the image again":
    "liên kết không chứa ảnh đã tải lên: hãy tải lên lần nữa",
  "only files and images from this page are accepted: URLs are not fetched":
    "chỉ nhận tệp và ảnh của trang này: không lấy gì từ một địa chỉ",
  "the browser does not let the page copy: the path is selected, copy it with Ctrl+C":
    "trình duyệt không cho trang chép: đường dẫn đã được chọn, hãy chép bằng Ctrl+C",
  "the link refers to an image that is not in the index: choose another":
    "liên kết nêu một ảnh không có trong chỉ mục: hãy chọn ảnh khác",
  "this index does not support filters: the filter in the link was ignored":
    "chỉ mục này không nhận bộ lọc: đã bỏ bộ lọc của liên kết",
};

const isVietnamese = navigator.language.toLowerCase().startsWith("vi");

// Returns a text in the user's language, with values in place of {0}, {1} and so on.
export function t(text, ...values) {
  const said = (isVietnamese && VIETNAMESE[text]) || text;
  return said.replace(/\{(\d)\}/g, (_, index) => values[index]);
}

export const grouped = (value) => value.toLocaleString(isVietnamese ? "vi" : "en");

// Translates the texts of the page's HTML.
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
