// Translations of the page. The English text, which the code contains, is the key; the browser determines the language.

const VIETNAMESE = {
  "Composed image retrieval": "Tìm ảnh bằng ảnh và mô tả",
  "Query": "Truy vấn",
  "What to look for, or what to change": "Tìm gì, hoặc đổi gì ở ảnh tham chiếu (nên dùng tiếng Anh)",
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
  "sum of image and text": "tổng của ảnh và văn bản",
  "sum, as in training": "tổng, như khi huấn luyện",
  "image only": "chỉ ảnh",
  "text only": "chỉ văn bản",
  "side by side": "đặt cạnh nhau",
  "Text in the sum:": "Phần của văn bản trong tổng:",
  "Image or text:": "Ảnh hay văn bản:",
  "as trained": "như khi huấn luyện",
  "towards the image": "nghiêng về ảnh",
  "towards the text": "nghiêng về văn bản",
  "Leave references out of the results": "Bỏ ảnh tham chiếu khỏi kết quả",
  "Only images where": "Chỉ những ảnh mà",
  "Steps so far": "Các bước đã qua",
  "Try an example with a known target": "Thử một ví dụ đã biết ảnh cần tìm",
  "Images to start from": "Ảnh để bắt đầu",
  "Other images": "Ảnh khác",
  "Results": "Kết quả",
  "Save as": "Lưu",
  "Save as JSON": "Lưu JSON",
  "Save as PNG": "Lưu PNG",
  "Save as SVG": "Lưu SVG",
  "Why these results": "Vì sao có kết quả này",
  "Path contains": "Đường dẫn chứa",
  "Show only results whose path contains this text": "Chỉ hiện kết quả có đường dẫn chứa chuỗi này",
  "More results": "Thêm kết quả",
  "Reference": "Ảnh tham chiếu",
  "References": "Các ảnh tham chiếu",
  "Use as reference": "Dùng làm ảnh tham chiếu",
  "Add as reference": "Thêm làm ảnh tham chiếu",
  "Add as reference: {0}": "Thêm làm ảnh tham chiếu: {0}",
  "Add a reference: upload it, or drop or paste it here": "Thêm ảnh tham chiếu: tải lên, hoặc thả hay dán vào đây",
  "Mean of {0} references": "Trung bình của {0} ảnh tham chiếu",
  "Remove {0}": "Bỏ {0}",
  "at most {0} references: remove one to add another": "tối đa {0} ảnh tham chiếu: hãy bỏ một ảnh để thêm ảnh khác",
  "Previous": "Trước",
  "Next": "Sau",
  "Arrow left": "Phím trái",
  "Arrow right": "Phím phải",
  "More like this": "Giống ảnh này",
  "Less like this": "Bớt giống ảnh này",
  "Find images less like the reference, then choose one": "Tìm ảnh bớt giống ảnh tham chiếu này, rồi chọn một ảnh",
  "Less like {0}": "Bớt giống {0}",
  "Less like": "Bớt giống",
  "Mark as target": "Đánh dấu là ảnh cần tìm",
  "Remove target": "Bỏ ảnh cần tìm",
  "Remove": "Bỏ",
  "Copy path": "Sao chép đường dẫn",
  "Copied": "Đã sao chép",
  "Download": "Tải về",
  "Close": "Đóng",
  "Reload": "Tải lại trang",
  "Combiner": "Combiner",
  "Sum": "Tổng",
  "Image only": "Chỉ ảnh",
  "Text only": "Chỉ văn bản",
  "Searching": "Đang tìm",
  "Sending…": "Đang gửi…",
  "No reference: choose an image, upload or paste one, or drop it here. Or search with text only.":
    "Chưa có ảnh tham chiếu: chọn, tải lên, dán hoặc thả ảnh vào đây. Hoặc chỉ tìm bằng văn bản.",
  "No reference": "Chưa có ảnh tham chiếu",
  "type what to look for, or choose an image": "gõ điều cần tìm, hoặc chọn một ảnh",
  "Reference: {0}": "Ảnh tham chiếu: {0}",
  "References: {0}": "Các ảnh tham chiếu: {0}",
  "{0} with a {1} · {2} images": "{0} cùng {1} · {2} ảnh",
  "{0} · {1} images": "{0} · {1} ảnh",
  "{0} of {1} images, {2} ms": "{0} / {1} ảnh, {2} ms",
  "{0} results, {1}": "{0} kết quả, {1}",
  "{0} of {1}": "{0} / {1}",
  "{0} of the {1} nearest images": "{0} trong {1} ảnh gần nhất",
  "Result {0}: {1}": "Kết quả {0}: {1}",
  "Enlarge result {0}: {1}": "Phóng to kết quả {0}: {1}",
  "Continue from this result": "Tìm tiếp từ ảnh này",
  "Enlarge": "Phóng to",
  "Image {0} of {1}: {2}": "Ảnh {0} / {1}: {2}",
  "Example: {0}, “{1}”": "Ví dụ: {0}, “{1}”",
  "more like this": "giống ảnh này",
  "Back to: {0}": "Trở lại: {0}",
  "Rank {0}, {1}, similarity {2}": "Hạng {0}, {1}, độ tương đồng {2}",
  "The target is at rank {0} of {1}": "Hạng của ảnh cần tìm: {0} / {1}",
  "The target is not among the first {0}": "Ảnh cần tìm không nằm trong {0} ảnh đầu",
  "The results depend {0} % on your text and {1} % on the reference.":
    "Kết quả dựa {0} % vào mô tả của bạn và {1} % vào ảnh tham chiếu.",
  "The results depend {0} % on your text and {1} % on the references.":
    "Kết quả dựa {0} % vào mô tả của bạn và {1} % vào các ảnh tham chiếu.",
  "{0} of {1} experts processed this query: each query is routed to the {0} experts that suit it best.":
    "{0} trong {1} chuyên gia xử lý truy vấn này: mỗi truy vấn được gửi đến {0} chuyên gia phù hợp nhất.",
  "Searched with the image only: your text was not used.": "Chỉ tìm bằng ảnh: mô tả của bạn không được dùng.",
  "Searched with the text only: no reference was used.": "Chỉ tìm bằng văn bản: ảnh tham chiếu không được dùng.",
  "your text": "mô tả của bạn",
  "expert {0}": "chuyên gia {0}",
  "not used": "không dùng",
  "Idle experts, to which no query was routed in the evaluation: {0}.":
    "Chuyên gia không hoạt động, vì khi đánh giá không truy vấn nào được gửi đến: {0}.",
  "The server was restarted: image numbers may have changed.":
    "Máy chủ đã khởi động lại: số thứ tự của ảnh có thể đã thay đổi.",
  "the server does not respond: check that it is running, then try again":
    "máy chủ không trả lời: hãy kiểm tra máy chủ có đang chạy không, rồi thử lại",
  "the server responded with status {0}: reload the page": "máy chủ trả về mã {0}: hãy tải lại trang",
  "links do not contain uploaded images: upload the image again":
    "liên kết không chứa ảnh đã tải lên: hãy tải ảnh lên lần nữa",
  "only files and images from this page are accepted: URLs are not fetched":
    "chỉ nhận tệp và ảnh của trang này, không tải ảnh từ địa chỉ web",
  "the browser does not allow copying: the path is selected, press Ctrl+C to copy it":
    "trình duyệt không cho sao chép: đường dẫn đã được chọn, hãy nhấn Ctrl+C",
  "the link refers to an image that is not in the index: choose another image":
    "liên kết trỏ đến một ảnh không có trong chỉ mục: hãy chọn ảnh khác",
  "this index does not support filters: the filter in the link was ignored":
    "chỉ mục này không hỗ trợ bộ lọc: bộ lọc trong liên kết đã bị bỏ qua",
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
