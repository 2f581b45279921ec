// A figure of a query and its results, as for a paper: an SVG that contains all of its images, or a PNG of it.
import { asUrl } from "./server.js";
import { t } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const SIDE = 160; // of an image; all lengths are in pixels of the SVG
const GAP = 12;
const SEAM = 4; // between references
const LINE = 18;
const COLUMNS = 6;
const FONT = { "font-family": "Arial, Helvetica, sans-serif", "font-size": 14, fill: "#000" };
const SHARPNESS = 3; // pixels of the PNG per pixel of the SVG

function node(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Returns an image element, which is empty if the server no longer has the image.
async function placed(address, x, y, side = SIDE) {
  const response = await fetch(address).catch(() => null);
  const href = response?.ok ? await asUrl(await response.blob()) : "data:,";
  return node("image", { href, x, y, width: side, height: side });
}

// Splits a text into lines, each at most about as wide as SIDE.
function wrapped(text) {
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `${FONT["font-size"]}px ${FONT["font-family"]}`;
  const most = Math.max(1, Math.floor((0.9 * SIDE * text.length) / pen.measureText(text).width));
  return text.match(new RegExp(`.{1,${most}}(?=\\s|$)|\\S{1,${most}}`, "gu")).map((line) => line.trim());
}

// Returns the SVG as text. references, less: addresses of images; less may be null.
// lists: { title, results: [{ address, isTarget }] }.
export async function figure({ references, text, less, lists }) {
  const parts = [];
  const write = (lines, x, y, how = {}) => {
    lines.forEach((line, at) => parts.push(node("text", { x, y: y + LINE * (at + 0.8), ...how }, line)));
    return y + LINE * lines.length;
  };
  const across = references.length > 1 ? 2 : 1;
  const pitch = (SIDE + SEAM) / across;
  references.forEach((reference, at) => {
    parts.push(placed(reference, (at % across) * pitch, Math.floor(at / across) * pitch, pitch - SEAM));
  });
  let height = Math.max(0, Math.ceil(references.length / across) * pitch - SEAM);
  if (text) height = write(wrapped(text), 0, height);
  if (less) {
    height = write([t("Less like")], 0, height + GAP);
    parts.push(placed(less, 0, height, SIDE / 2));
    height += SIDE / 2;
  }
  const left = SIDE + 2 * GAP;
  let top = 0;
  for (const { title, results } of lists) {
    if (lists.length > 1) top = write([title], left, top, { "font-weight": "bold" });
    results.forEach(({ address, isTarget }, at) => {
      const x = left + (at % COLUMNS) * (SIDE + GAP);
      const y = top + Math.floor(at / COLUMNS) * (SIDE + LINE + GAP);
      parts.push(placed(address, x, y));
      const outline = { x, y, width: SIDE, height: SIDE, fill: "none", stroke: "#1a7a41", "stroke-width": 4 };
      if (isTarget) parts.push(node("rect", outline));
      write([at + 1], x + SIDE / 2, y + SIDE, { "text-anchor": "middle" });
    });
    top += Math.ceil(results.length / COLUMNS) * (SIDE + LINE + GAP);
  }
  const columns = Math.min(COLUMNS, Math.max(...lists.map(({ results }) => results.length)));
  const size = { width: left + columns * (SIDE + GAP) + GAP, height: Math.max(height, top) + 2 * GAP };
  const corner = { x: -GAP, y: -GAP };
  const paper = node("rect", { ...corner, ...size, fill: "#fff" });
  const box = Object.values({ ...corner, ...size }).join(" ");
  const drawn = node("svg", { ...size, viewBox: box, ...FONT }, paper, ...(await Promise.all(parts)));
  return new XMLSerializer().serializeToString(drawn);
}

export async function asPng(svg) {
  const image = new Image();
  image.src = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = SHARPNESS * image.width;
  canvas.height = SHARPNESS * image.height;
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  URL.revokeObjectURL(image.src);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}
