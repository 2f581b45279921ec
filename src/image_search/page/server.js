// What the page asks of its server, and the images that a visitor brings along. An image is made small here, sent once,
// and asked with by the name that the server gives it.
import { t } from "./words.js";

const MOST_TRIES = 5; // where the server has too much to do
const GONE = 410; // the server does not keep an upload any more
const LONGEST = 1024; // pixels of an image that is sent; several times what a CLIP sees
const LIGHT = 300_000; // bytes of an image that is sent as it is
const QUALITY = 0.92; // of what is made small

const uploads = new Map(); // id -> { file, name, picture, upload }: the last is the server's name for it

async function request(address, options = {}) {
  for (let tries = 1; ; tries += 1) {
    let answer;
    try {
      answer = await fetch(address, options);
    } catch {
      throw new Error(t("the server does not answer: see whether it runs, then try again"));
    }
    if (answer.ok) return answer;
    if ((answer.status === 429 || answer.status === 503) && tries < MOST_TRIES) {
      const wait = Number(answer.headers.get("retry-after")) || 1;
      await new Promise((done) => setTimeout(done, 1000 * wait));
      continue;
    }
    const said = await answer.json().catch(() => ({}));
    const message = said.error || t("the server answers {0}: load the page again", answer.status);
    throw Object.assign(new Error(message), { status: answer.status });
  }
}

export async function json(address, options) {
  return (await request(address, options)).json();
}

// The answers to a question. A field has a value, or a list of them. ids: field -> the page's own names of uploads.
// Where the server has forgotten an upload, it is sent again.
export async function search(fields, ids) {
  const images = Object.entries(ids).flatMap(([field, of]) => [of].flat().map((id) => [field, uploads.get(id)]));
  const ask = () => {
    const form = new FormData();
    for (const [name, value] of Object.entries(fields)) for (const each of [value].flat()) form.append(name, each);
    for (const [field, image] of images) form.append(field, image.upload);
    return json("search", { method: "POST", body: form });
  };
  if (images.some(([, image]) => !image)) throw new Error(t("the uploaded image is not part of a link: upload it again"));
  try {
    return await ask();
  } catch (error) {
    if (error.status !== GONE) throw error;
  }
  await Promise.all(images.map(([, image]) => send(image)));
  return ask();
}

// Uploads

export const uploadedPicture = (id) => uploads.get(id)?.picture;

// Sends an image and returns the page's own name for it.
export async function takeUpload(file) {
  const name = file.name || "pasted.png";
  const image = { name, file: await smaller(file) };
  await send(image);
  const id = `upload-${Date.now()}-${uploads.size}`;
  uploads.set(id, image);
  await keep(id, image);
  return id;
}

async function send(image) {
  const form = new FormData();
  form.append("image", image.file, image.file.name || image.name);
  Object.assign(image, await json("upload", { method: "POST", body: form }));
}

// A copy with as many pixels as it takes, if the browser can read the image. What it cannot read is the server's to say.
async function smaller(file) {
  if (file.size <= LIGHT) return file;
  const image = await createImageBitmap(file).catch(() => null);
  if (!image) return file;
  const scale = Math.min(1, LONGEST / Math.max(image.width, image.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * image.width));
  canvas.height = Math.max(1, Math.round(scale * image.height));
  const drawing = canvas.getContext("2d");
  drawing.imageSmoothingQuality = "high";
  drawing.drawImage(image, 0, 0, canvas.width, canvas.height);
  image.close();
  const kind = file.type === "image/jpeg" ? file.type : "image/webp"; // which keeps what is transparent
  const copy = await new Promise((done) => canvas.toBlob(done, kind, QUALITY));
  if (!copy || copy.size >= file.size) return file;
  const ending = copy.type.replace("image/", "");
  return new File([copy], `${(file.name || "pasted").replace(/\.\w+$/, "")}.${ending}`, { type: copy.type });
}

// An upload outlives a reload of its tab, if the browser has room for it.
async function keep(id, image) {
  const { name, file, picture, upload } = image;
  const kept = { name, sent: file.name, content: await asUrl(file), picture, upload };
  try {
    sessionStorage.setItem(id, JSON.stringify(kept));
  } catch {
    sessionStorage.removeItem(id);
  }
}

export function bringBack(id) {
  const kept = JSON.parse(sessionStorage.getItem(id) || "null");
  if (!kept) return;
  const bytes = Uint8Array.from(atob(kept.content.split(",")[1]), (letter) => letter.charCodeAt(0));
  const { name, picture, upload } = kept;
  uploads.set(id, { name, picture, upload, file: new File([bytes], kept.sent) });
}

export function asUrl(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = failed;
    reader.readAsDataURL(blob);
  });
}
