// The search page. All that is shown is made of text nodes and attributes, never of HTML, so that no name or text of
// anybody is run. What the page shows is told by `state`, of which each entry of the browser's history has one: so
// undo is the browser's way back, and a link or a reload opens the same question again.
"use strict";

const MOST_STEPS = 50;
const LOOKED_EVERY = 15000; // ms, whether the server still answers
const MOST_TRIES = 5; // where the server has too much to do
const EXAMPLES = ["is red", "is blue", "is larger", "has stripes"];
const TITLES = { sum: "Sum", image: "Image only", text: "Text only" };
const START = { steps: [], depth: 0, target: null };

let health = { server: "", composes: "sum", k: 12, kinds: [], filters: false };
let state = START;
let shownKey = ""; // of the answers that are on the page
let asking = 0; // the number of the last question; what comes of earlier ones is dropped
let enlarged = null; // the answer that is shown large
const uploads = new Map(); // id -> { file, picture }
const answersOf = new Map(); // question in JSON -> answers, for the way back

const $ = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// What is said

function toast(message, action = null) {
  const same = [...$("toasts").children].find((shown) => shown.firstChild.textContent === message);
  if (same) same.remove();
  const close = element("button", { type: "button", textContent: action ? action.name : "Close" });
  const shown = element("div", { className: "toast" }, element("div", { textContent: message }), close);
  close.onclick = () => (action ? action.run() : shown.remove());
  $("toasts").append(shown);
  if (!action) setTimeout(() => shown.remove(), 12000);
}

function say(message) {
  $("status").textContent = message;
}

// The server

async function request(address, options = {}) {
  for (let tries = 1; ; tries += 1) {
    let answer;
    try {
      answer = await fetch(address, options);
    } catch {
      throw new Error("the server does not answer: see whether it runs, then try again");
    }
    if (answer.ok) return answer;
    if ((answer.status === 429 || answer.status === 503) && tries < MOST_TRIES) {
      const wait = Number(answer.headers.get("retry-after")) || 1;
      await new Promise((done) => setTimeout(done, 1000 * wait));
      continue;
    }
    const said = await answer.json().catch(() => ({}));
    throw new Error(said.error || `the server answers ${answer.status}: load the page again`);
  }
}

async function json(address, options) {
  return (await request(address, options)).json();
}

function noticeRestart(server) {
  if (health.server && server !== health.server) {
    const reload = { name: "Load again", run: () => location.reload() };
    toast("The server was restarted: its images may have other numbers now.", reload);
  }
}

async function look() {
  if (document.hidden) return;
  try {
    noticeRestart((await json("health")).server);
  } catch (error) {
    toast(error.message);
  }
}

const picture = (row, size = "small") => `image/${row}?size=${size}&of=${health.server}`;

// References

function pictureOf(step) {
  return step.upload ? uploads.get(step.upload)?.picture : picture(step.row);
}

function bytesAsUrl(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = failed;
    reader.readAsDataURL(blob);
  });
}

// An upload outlives a reload of its tab, if the browser has room for it.
function keep(id, name, content, shown) {
  try {
    sessionStorage.setItem(id, JSON.stringify({ name, content, picture: shown }));
  } catch {
    sessionStorage.removeItem(id);
  }
}

function bringBack(id) {
  const kept = JSON.parse(sessionStorage.getItem(id) || "null");
  if (!kept) return;
  const bytes = Uint8Array.from(atob(kept.content.split(",")[1]), (letter) => letter.charCodeAt(0));
  uploads.set(id, { file: new File([bytes], kept.name), picture: kept.picture });
}

async function takeFile(file) {
  const form = new FormData();
  form.append("image", file, file.name || "pasted.png");
  const preview = await bytesAsUrl(await (await request("preview", { method: "POST", body: form })).blob());
  const id = `upload-${Date.now()}-${uploads.size}`;
  uploads.set(id, { file, picture: preview });
  keep(id, file.name || "pasted.png", await bytesAsUrl(file), preview);
  choose({ row: null, upload: id, name: file.name || "pasted image" });
}

// Steps

const last = () => state.steps.at(-1);
const lastAsked = (of) => of.steps.findLast((step) => step.how);

function addressOf(of) {
  const step = of.steps.at(-1);
  const words = new URLSearchParams();
  if (step && step.row !== null) words.set("row", step.row);
  if (step?.how) {
    if (step.text) words.set("text", step.text);
    if (step.how.method !== "pair") words.set("method", step.how.method);
    if (step.how.method === "sum") words.set("mix", step.how.mix);
    if (!step.how.without) words.set("without", "0");
    if (step.how.filter) words.set("filter", step.how.filter);
  }
  const text = words.toString();
  return text ? `?${text}` : location.pathname;
}

function go(next, replaces = false) {
  const made = { ...next, depth: replaces ? state.depth : state.depth + 1 };
  if (replaces) history.replaceState(made, "", addressOf(made));
  else history.pushState(made, "", addressOf(made));
  state = made;
  show();
}

// A reference that was not asked with gives way to the next one.
function withStep(step) {
  const kept = last() && !last().how ? state.steps.slice(0, -1) : state.steps;
  return { ...state, steps: [...kept, step].slice(-MOST_STEPS) };
}

function choose(reference, text = $("text").value) {
  const replaces = Boolean(last()) && !last().how;
  go(withStep({ ...reference, text, how: null }), replaces);
  say(`Reference: ${reference.name}`);
}

function chosenHow() {
  const method = $("method").value;
  const how = { method, without: $("without").checked, filter: $("filter").value.trim() };
  return method === "sum" ? { ...how, mix: Number($("mix").value) / 100 } : how;
}

async function ask(text = $("text").value, how = chosenHow()) {
  const typed = text.trim();
  const step = last() || { row: null, upload: null, name: "" };
  const asked = { ...step, text: typed, how };
  const next = { ...state, steps: [...state.steps.slice(0, -1), asked] };
  const number = (asking += 1);
  try {
    const lists = await answersTo(asked);
    if (number !== asking) return;
    if (last() && !last().how) {
      history.replaceState({ ...state, steps: [...state.steps.slice(0, -1), { ...step, text: typed }] }, "");
    }
    shownKey = keyOf(asked);
    showAnswers(lists);
    go(next);
  } catch (error) {
    if (number !== asking) return;
    toast(error.message);
    shownKey = "";
    await show();
    showNote(error.message);
  }
}

// Questions

function listsOf(how) {
  const composed = { key: "pair", title: health.composes === "sum" ? "Sum" : "Combiner", mix: null };
  const one = { key: how.method, title: TITLES[how.method], mix: { sum: how.mix, image: 0, text: 1 }[how.method] };
  if (how.method === "pair") return [composed];
  if (how.method !== "side") return [one];
  return [composed, { key: "image", title: TITLES.image, mix: 0 }, { key: "text", title: TITLES.text, mix: 1 }];
}

function formOf(step, mix) {
  const form = new FormData();
  if (mix !== 1 && step.row !== null) form.append("row", step.row);
  if (mix !== 1 && step.upload) {
    const upload = uploads.get(step.upload);
    if (!upload) throw new Error("the uploaded image is not part of a link: upload it again");
    form.append("image", upload.file, upload.file.name || "pasted.png");
  }
  if (mix !== 0) form.append("text", step.text);
  if (mix !== null) form.append("mix", mix);
  if (step.how.without && mix !== 1 && step.row !== null) form.append("without_reference", "true");
  if (step.how.filter) form.append("filter", step.how.filter);
  if (state.target !== null) form.append("target", state.target);
  return form;
}

// The server answers the lists of one question together.
const keyOf = (step) => JSON.stringify([step, state.target]);

async function answersTo(step) {
  const key = keyOf(step);
  if (answersOf.has(key)) return answersOf.get(key);
  const lists = listsOf(step.how);
  showSkeletons(lists);
  const found = await Promise.all(
    lists.map((list) => json("search", { method: "POST", body: formOf(step, list.mix) })),
  );
  noticeRestart(found[0].server);
  const answered = lists.map((list, place) => ({ ...list, ...found[place] }));
  answersOf.set(key, answered);
  if (answersOf.size > MOST_STEPS) answersOf.delete(answersOf.keys().next().value);
  return answered;
}

// What the page shows

async function show() {
  const step = last();
  showReference(step);
  showSteps();
  $("text").value = step ? step.text : $("text").value;
  showHow(step?.how);
  $("undo").disabled = state.depth === 0;
  $("start").hidden = Boolean(step);
  const asked = lastAsked(state);
  $("answers").hidden = !asked;
  document.title = asked?.text ? `${asked.text} · Composed image retrieval` : "Composed image retrieval";
  const key = asked ? keyOf(asked) : "";
  if (key === shownKey) return;
  shownKey = key;
  if (!asked) return showAnswers([]);
  const number = (asking += 1);
  try {
    const lists = await answersTo(asked);
    if (number === asking) showAnswers(lists);
  } catch (error) {
    if (number !== asking) return;
    showAnswers([]);
    showNote(error.message);
    toast(error.message);
  }
}

function showReference(step) {
  const shown = step && (step.row !== null || step.upload) ? pictureOf(step) : null;
  if (!shown) return $("reference").replaceChildren();
  const image = element("img", { src: shown, alt: `Reference: ${step.name}` });
  $("reference").replaceChildren(image, element("figcaption", { textContent: step.name }));
}

function showSteps() {
  const items = state.steps.map((step) => {
    const shown = step.row !== null || step.upload ? pictureOf(step) : null;
    const parts = shown ? [element("img", { src: shown, alt: step.name })] : [];
    if (step.how) parts.push(step.text ? `“${step.text}”` : "more like this");
    return element("li", {}, ...parts);
  });
  $("history").replaceChildren(...items);
}

function showHow(how) {
  if (how) {
    $("method").value = how.method;
    $("without").checked = how.without;
    $("filter").value = how.filter;
    if (how.method === "sum") $("mix").value = Math.round(100 * how.mix);
  }
  $("mixing").hidden = $("method").value !== "sum";
  $("share").value = `${$("mix").value} %`;
}

function showNote(text) {
  $("answers").hidden = false;
  $("note").textContent = text;
}

function showSkeletons(lists) {
  $("answers").hidden = false;
  const { top } = $("answers").getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) $("answers").scrollIntoView();
  $("note").textContent = "";
  $("experts").replaceChildren();
  const made = lists.map((list, place) => {
    const cards = Array.from({ length: health.k }, () => element("li", { className: "skeleton" }));
    return listOf(list, place, lists.length, cards);
  });
  $("lists").setAttribute("aria-busy", "true");
  $("lists").replaceChildren(...made);
  say("Searching");
}

function listOf(list, place, count, cards) {
  $("lists").classList.toggle("side-by-side", count > 1);
  const grid = element("ol", { className: "grid results", id: place ? `results-${list.key}` : "results" }, ...cards);
  const title = count > 1 ? [element("h3", { textContent: `${list.title} ` })] : [];
  return element("section", { className: "list" }, ...title, grid);
}

function showAnswers(lists) {
  $("lists").removeAttribute("aria-busy");
  $("answers").hidden = !lists.length;
  const made = lists.map((list, place) => {
    const cards = list.answers.map((answer, row) => cardOf(answer, row + 1, list, lists.length));
    return listOf(list, place, lists.length, cards);
  });
  $("lists").replaceChildren(...made);
  $("note").textContent = lists.find((list) => list.note)?.note || "";
  showExperts(lists[0]);
  markTarget(lists);
  narrow();
  if (lists.length) say(lists.map((list) => `${list.answers.length} answers, ${list.title}`).join("; "));
}

function cardOf(answer, place, list, count) {
  const of = `${place} of ${list.answers.length}${count > 1 ? `, ${list.title}` : ""}`;
  const image = element("img", { src: picture(answer.row), alt: `Answer ${of}: ${answer.name}`, loading: "lazy" });
  const pick = element("button", { className: "pick", type: "button", title: "Go on from it" }, image);
  pick.onclick = () => choose({ row: answer.row, upload: null, name: answer.name }, "");
  const label = `Open answer ${of} large: ${answer.name}`;
  const enlarge = element("button", { className: "enlarge", type: "button", textContent: "⤢", title: "Open large" });
  enlarge.setAttribute("aria-label", label);
  enlarge.onclick = () => openLarge(answer, place, list);
  const about = element("p", { className: "caption" });
  const number = element("span", { className: "quiet", textContent: `${place}. ${answer.similarity.toFixed(3)} ` });
  about.append(number, answer.name);
  const card = element("li", { className: "card" }, pick, enlarge, about);
  card.dataset.path = answer.path.toLowerCase();
  return card;
}

// Hides the answers whose path has not what is typed.
function narrow() {
  const wanted = $("within").value.trim().toLowerCase();
  const cards = [...document.querySelectorAll("#lists .card")];
  for (const card of cards) card.hidden = !card.dataset.path.includes(wanted);
  $("kept").value = wanted ? `${cards.filter((card) => !card.hidden).length} of ${cards.length}` : "";
}

// Why these answers: what the gate and the experts did, in bars and in a sentence.
function showExperts(list) {
  $("experts").replaceChildren();
  if (!list || list.gate === null) return;
  const shares = [["text in the gate", list.gate], ...list.experts.map((share, number) => [`expert ${number}`, share])];
  const bars = element("div", { className: "bars" });
  for (const [name, share] of shares) {
    const bar = element("i");
    bar.style.width = `${Math.round(100 * share)}%`;
    bars.append(element("span", { textContent: name }), bar, element("span", { textContent: share.toFixed(2) }));
  }
  const text = Math.round(100 * list.gate);
  let why = `Why these: the gate takes ${text} % of its mixture from the text and ${100 - text} % from the reference`;
  if (list.experts.length) {
    const most = list.experts.indexOf(Math.max(...list.experts));
    why += `, and expert ${most} has most to say of what is added to it`;
  }
  $("experts").append(element("p", { textContent: `${why}.` }), bars);
}

// Where the image that is looked for stands in each list, once a visitor has said which it is.
function markTarget(lists) {
  if (state.target === null) return;
  document.querySelectorAll(".list").forEach((section, number) => {
    const { place } = lists[number];
    const card = section.querySelectorAll(".card")[place - 1];
    card?.classList.add("target");
    const where = place ? `at place ${place}` : `not among the first ${health.places}`;
    const text = `What you look for is ${where}`;
    section.querySelector(".grid").before(element("p", { className: "place", textContent: text }));
  });
}

function openLarge(answer, place, list) {
  enlarged = answer;
  $("large-image").src = picture(answer.row, "large");
  $("large-image").alt = answer.name;
  $("large-name").textContent = answer.name;
  $("large-about").textContent = `Place ${place}, ${list.title}, similarity ${answer.similarity.toFixed(4)}`;
  $("large-path").textContent = answer.path;
  $("download").href = picture(answer.row, "large");
  $("download").download = `${answer.name.replace(/\.\w+$/, "")}.jpg`;
  $("large").showModal();
}

async function copyPath() {
  try {
    await navigator.clipboard.writeText(enlarged.path);
    say("Copied");
    $("copy").textContent = "Copied";
    setTimeout(() => ($("copy").textContent = "Copy path"), 1500);
  } catch {
    // Browsers copy on pages of this machine or by https alone.
    getSelection().selectAllChildren($("large-path"));
    toast("the browser does not let the page copy: the path is selected, copy it by Ctrl+C");
  }
}

// Images to start from

function photoCard(photo, alt, onclick, ...about) {
  const image = element("img", { src: picture(photo.row), alt, loading: "lazy" });
  const pick = element("button", { className: "pick", type: "button" }, image);
  pick.onclick = onclick;
  return element("li", { className: "card" }, pick, ...about);
}

async function offer() {
  const photos = await json("some?count=40");
  const cards = photos.map((photo, place) =>
    photoCard(photo, `Image ${place + 1} of ${photos.length}: ${photo.name}`, () =>
      choose({ row: photo.row, upload: null, name: photo.name }),
    ),
  );
  $("choice").replaceChildren(...cards);
  return photos;
}

function offerExamples(photos) {
  const cards = EXAMPLES.slice(0, photos.length).map((text, place) => {
    const photo = photos[place];
    const about = element("p", { textContent: `“${text}”` });
    const start = () => {
      choose({ row: photo.row, upload: null, name: photo.name }, text);
      ask(text);
    };
    return photoCard(photo, `Example: ${photo.name}, “${text}”`, start, about);
  });
  $("examples").replaceChildren(...cards);
}

// What the visitor does

function moveInGrid(event) {
  const pick = event.target.closest?.(".pick");
  if (!pick) return;
  const picks = [...pick.closest(".grid").querySelectorAll(".card:not([hidden]) .pick")];
  const top = picks[0].getBoundingClientRect().top;
  const columns = picks.filter((other) => Math.abs(other.getBoundingClientRect().top - top) < 2).length;
  const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  const next = by && picks[picks.indexOf(pick) + by];
  if (!next) return;
  event.preventDefault();
  next.focus();
}

function takeDropped(event) {
  event.preventDefault();
  document.body.classList.remove("dragged");
  const [file] = event.dataTransfer.files;
  if (file) tell(takeFile(file));
  else toast("only files are taken: nothing is fetched from an address");
}

function tell(work) {
  return work.catch((error) => {
    toast(error.message);
    if (lastAsked(state)) showNote(error.message);
  });
}

function askAgain() {
  showHow(null);
  if (last()?.how) ask();
}

function listen() {
  $("question").onsubmit = (event) => {
    event.preventDefault();
    ask();
  };
  $("undo").onclick = () => history.back();
  $("upload").onclick = () => $("file").click();
  $("file").onchange = () => {
    const [file] = $("file").files;
    $("file").value = "";
    if (file) tell(takeFile(file));
  };
  for (const id of ["method", "mix", "without", "filter"]) $(id).onchange = askAgain;
  $("within").oninput = narrow;
  $("mix").oninput = () => showHow(null);
  $("more").onclick = () => tell(offer());
  $("use").onclick = () => {
    $("large").close();
    choose({ row: enlarged.row, upload: null, name: enlarged.name }, "");
  };
  $("alike").onclick = () => {
    $("large").close();
    choose({ row: enlarged.row, upload: null, name: enlarged.name }, "");
    ask("", { method: "image", without: $("without").checked, filter: $("filter").value.trim() });
  };
  $("target").onclick = () => {
    $("large").close();
    go({ ...state, target: enlarged.row }, true);
  };
  $("copy").onclick = copyPath;
  $("close").onclick = () => $("large").close();
  $("large").onclick = (event) => event.target === $("large") && $("large").close();
  document.addEventListener("keydown", (event) => {
    moveInGrid(event);
    if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName) && !$("large").open) {
      event.preventDefault();
      $("text").focus();
    }
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) tell(takeFile(file));
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragged");
  });
  document.addEventListener("dragleave", () => document.body.classList.remove("dragged"));
  document.addEventListener("drop", takeDropped);
  document.addEventListener("visibilitychange", look);
  setInterval(look, LOOKED_EVERY);
  addEventListener("popstate", (event) => {
    state = event.state || START;
    show();
  });
}

// The question that the page's address holds.
async function linked() {
  const words = new URLSearchParams(location.search);
  const row = /^\d+$/.test(words.get("row") || "") ? words.get("row") : null;
  const text = words.get("text") || "";
  const wanted = words.get("method") || "pair";
  const method = [...$("method").options].some((option) => option.value === wanted) ? wanted : "pair";
  if (row === null && method !== "text") return START;
  const name = row === null ? "" : (await json(`photo/${row}`)).name;
  const how = { method, without: words.get("without") !== "0", filter: words.get("filter") || "" };
  if (method === "sum") how.mix = Math.min(1, Math.max(0, Number(words.get("mix") ?? 0.5) || 0));
  const isAsked = text || method === "image";
  return { ...START, steps: [{ row, upload: null, name, text, how: isAsked ? how : null }] };
}

async function begin() {
  listen();
  $("options").open = matchMedia("(min-width: 761px)").matches;
  health = await json("health");
  $("file").accept = health.kinds.join(",");
  $("filtering").hidden = !health.filters;
  $("method").options[0].textContent = health.composes === "sum" ? "sum, as trained" : "Combiner";
  const offered = tell(offer().then(offerExamples));
  for (const step of history.state?.steps || []) if (step.upload) bringBack(step.upload);
  state = history.state || (await linked().catch((error) => (toast(error.message), START)));
  history.replaceState(state, "");
  if (last()) $("text").value = last().text;
  await show();
  await offered;
}

tell(begin());
