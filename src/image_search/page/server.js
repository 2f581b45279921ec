// Requests to the server, and the user's uploads. An image is scaled down here and sent once; later queries refer to it
// by the name that the server returned.
import { t } from "./words.js";

const MOST_TRIES = 5; // while the server, or a proxy in front of it, is overloaded
const GONE = 410; // status of a query whose upload is no longer stored
const LONGEST = 1024; // pixels of the longer side of an image that is sent; several times the input size of CLIP
const LIGHT = 300_000; // maximum bytes of an image that is sent unchanged
const QUALITY = 0.92; // of images that are scaled down

const uploads = new Map(); // id -> { file, name, picture, upload }; upload: the server's name for it

async function request(address, options = {}) {
  for (let tries = 1; ; tries += 1) {
    let response;
    try {
      response = await fetch(address, options);
    } catch {
      throw new Error(t("the server does not respond: check that it is running, then try again"));
    }
    if (response.ok) return response;
    if ((response.status === 429 || response.status === 503) && tries < MOST_TRIES) {
      const wait = Number(response.headers.get("retry-after")) || 1;
      await new Promise((done) => setTimeout(done, 1000 * wait));
      continue;
    }
    const body = await response.json().catch(() => ({}));
    const message = body.error || t("the server responded with status {0}: reload the page", response.status);
    throw Object.assign(new Error(message), { status: response.status });
  }
}

export async function json(address, options) {
  return (await request(address, options)).json();
}

// Returns the results of a query. A field has a value or a list of values. ids: field -> the page's own names of uploads.
// Uploads that the server no longer stores are sent again.
export async function search(fields, ids) {
  const images = Object.entries(ids).flatMap(([field, of]) => [of].flat().map((id) => [field, uploads.get(id)]));
  const post = () => {
    const form = new FormData();
    for (const [name, value] of Object.entries(fields)) for (const each of [value].flat()) form.append(name, each);
    for (const [field, image] of images) form.append(field, image.upload);
    return json("search", { method: "POST", body: form });
  };
  if (images.some(([, image]) => !image)) throw new Error(t("links do not contain uploaded images: upload the image again"));
  try {
    return await post();
  } catch (error) {
    if (error.status !== GONE) throw error;
  }
  await Promise.all(images.map(([, image]) => send(image)));
  return post();
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

// Returns a smaller copy, if the browser can decode the image. Otherwise the server reports what is wrong with it.
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
  const kind = file.type === "image/jpeg" ? file.type : "image/webp"; // WebP keeps transparency
  const copy = await new Promise((done) => canvas.toBlob(done, kind, QUALITY));
  if (!copy || copy.size >= file.size) return file;
  const ending = copy.type.replace("image/", "");
  return new File([copy], `${(file.name || "pasted").replace(/\.\w+$/, "")}.${ending}`, { type: copy.type });
}

// Stores an upload in the tab, so that it survives a reload, if the browser has enough space for it.
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
