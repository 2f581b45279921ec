// The search page. All that is shown is made of text nodes and attributes, never of HTML, so that no name or text of
// anybody is run. What the page shows is told by `state`, of which each entry of the browser's history has one: so
// undo is the browser's way back, and a link or a reload opens the same question again.
import { asPng, figure } from "./figure.js";
import { bringBack, json, search, takeUpload, uploadedPicture } from "./server.js";
import { grouped, t, translate } from "./words.js";

const MOST_STEPS = 50;
const LOOKED_EVERY = 15000; // ms, whether the server still answers
const OFFERED = 24; // references
const EXAMPLES = 4;
const ROW = "application/x-row"; // what is dragged of the page's own images
const TITLES = { sum: "Sum", image: "Image only", text: "Text only" };
const SHARES = { image: 0, text: 1 }; // of the text, where one of both is asked with alone

// steps: what was asked, and last references that were not asked with yet, whose `how` is null. A reference is
// { row, upload, name }, and so is `less` of a step: an image that results are to look less like. target: the row that
// is looked for. large: { list, place } of the answer that is shown large. depth: entries of the history before this.
const START = { steps: [], depth: 0, target: null, large: null };

let health = {
  server: "", composes: "sum", images: 0, k: 12, most: 12, references: 1, kinds: [], filters: false, experts: [],
};
let state = START;
let shownKey = ""; // of the answers that are on the page
let shown = []; // those answers, in lists
let isAdding = false; // whether files that are picked are added to the references
let asking = 0; // the number of the last question; what comes of earlier ones is dropped
const answersOf = new Map(); // question in JSON -> answers, for the way back

const $ = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// What is said

function toast(message, action = null) {
  const same = [...$("toasts").children].find((other) => other.firstChild.textContent === message);
  if (same) same.remove();
  const close = element("button", { type: "button", textContent: t("Close") });
  const made = element("div", { className: "toast" }, element("div", { textContent: message }), close);
  close.onclick = () => made.remove();
  if (action) close.before(element("button", { type: "button", textContent: action.name, onclick: action.run }), " ");
  $("toasts").append(made);
  if (!action) setTimeout(() => made.remove(), 12000);
}

function say(message) {
  $("status").textContent = message;
}

function tell(work) {
  return work.catch((error) => toast(error.message));
}

function noticeRestart(server) {
  if (!health.server || server === health.server) return;
  const reload = { name: t("Load again"), run: () => location.reload() };
  toast(t("The server was restarted: its images may have other numbers now."), reload);
}

async function look() {
  if (!document.hidden) noticeRestart((await json("health")).server);
}

const picture = (row, size = "small") => `image/${row}?size=${size}&of=${health.server}`;

// Steps

const last = () => state.steps.at(-1);
const lastAsked = (of) => of.steps.findLast((step) => step.how);
const chosen = () => last()?.references ?? [];
const isChosen = (photo) => chosen().some(({ row }) => row === photo.row);
const isRow = (text) => /^\d{1,19}$/.test(text);
// Whether the slider leans the Combiner's gate.
const leans = (method) => method === "pair" && health.composes === "combiner";
const isPending = () => Boolean(last()) && !last().how;

function pictureOf({ row, upload }, size) {
  return (upload ? uploadedPicture(upload) : picture(row, size)) || "data:,";
}

function namesOf(references) {
  if (!references.length) return t("No reference");
  const names = references.map(({ name }) => name).join(", ");
  return t(references.length > 1 ? "References: {0}" : "Reference: {0}", names);
}

function addressOf(of) {
  const step = of.steps.at(-1);
  const words = new URLSearchParams();
  for (const { row } of step?.references ?? []) if (row !== null) words.append("row", row);
  if (step?.less?.row) words.set("less", step.less.row);
  if (step?.how) {
    words.set("text", step.text);
    if (step.how.method !== "pair") words.set("method", step.how.method);
    for (const share of ["mix", "lean"]) if (share in step.how) words.set(share, step.how[share]);
    if (!step.how.without) words.set("without", "0");
    if (step.how.filter) words.set("filter", step.how.filter);
  }
  if (of.target !== null) words.set("target", of.target);
  const text = words.toString();
  return text ? `?${text}` : location.pathname;
}

// Makes another state the page's, as a new entry of the history or in place of the last.
function go(next, replaces = false) {
  const made = { ...next, depth: replaces ? state.depth : state.depth + 1 };
  if (replaces) history.replaceState(made, "", addressOf(made));
  else history.pushState(made, "", addressOf(made));
  state = made;
  return show();
}

// References that were not asked with give way to the next ones. The large view is left with them.
function choose(references, text = $("text").value, less = last()?.less) {
  const kept = isPending() ? state.steps.slice(0, -1) : state.steps;
  const steps = [...kept, { references, less, text, how: null }].slice(-MOST_STEPS);
  const replaces = isPending() || state.large !== null;
  $("text").value = text;
  say(namesOf(references));
  return go({ ...state, steps, large: null }, replaces);
}

// As many images as there is room for beside references that stay.
function fitting(images, kept) {
  const room = Math.max(0, health.references - kept.length);
  if (images.length > room) toast(t("at most {0} references: remove one to add another", health.references));
  return images.slice(0, room);
}

function add(reference) {
  if (isChosen(reference)) return;
  const added = fitting([reference], chosen());
  if (added.length) choose([...chosen(), ...added]);
}

function chosenHow() {
  const method = $("method").value;
  const how = { method, without: $("without").checked, filter: $("filter").value.trim() };
  const share = Number($("mix").value) / 100;
  if (method === "sum") how.mix = share;
  if (leans(method) && share !== 0.5) how.lean = share; // in the middle it is as trained
  return how;
}

// Asks, and goes on to the answers. A question that fails leaves the page, and what was typed, as it was.
async function ask({
  text = $("text").value.trim(), less = last()?.less, replaces = isPending(), target = state.target,
} = {}) {
  const step = { references: chosen(), less, text, how: chosenHow() };
  const next = { ...state, target, large: null, steps: [...state.steps.slice(0, -1), step] };
  const number = (asking += 1);
  try {
    await answersTo(step, target);
    if (number !== asking) return;
    const isSame = last()?.how && keyOf(last(), state.target) === keyOf(step, target);
    await go(next, replaces || isSame);
  } catch (error) {
    if (number !== asking) return;
    toast(error.message);
    shownKey = "";
    await show();
  }
}

// Questions

// What is asked of the server: the composed list, others, or several side by side. Without a text or without a
// reference there is one way to ask, whatever was chosen.
function listsOf({ references, text, how }) {
  const alone = (method) => ({ key: method, title: t(TITLES[method]), mix: SHARES[method] });
  if (!references.length && !text) throw new Error(t("type what to look for, or choose an image"));
  if (!references.length) return [alone("text")];
  if (!text) return [alone("image")];
  const composed = { key: "pair", title: t(health.composes === "sum" ? "Sum" : "Combiner"), mix: null };
  if (how.method === "pair") return [composed];
  if (how.method === "side") return [composed, alone("image"), alone("text")];
  return how.method === "sum" ? [{ key: "sum", title: t("Sum"), mix: how.mix }] : [alone(how.method)];
}

// The answers of a list, as many as the server gives or `k`.
function found(step, target, { list, k }) {
  const fields = { mix: list.mix, text: list.mix === 0 ? null : step.text, k, target };
  const references = list.mix === 1 ? [] : step.references;
  fields.row = references.flatMap(({ row }) => row ?? []);
  fields.less_row = step.less?.row;
  if (list.key === "pair") fields.lean = step.how.lean;
  if (fields.row.length && step.how.without) fields.without_reference = "true";
  fields.filter = step.how.filter || null;
  const given = Object.entries(fields).filter(([, value]) => (value ?? null) !== null);
  const ids = { upload: references.flatMap(({ upload }) => upload ?? []), less_upload: step.less?.upload ?? [] };
  return search(Object.fromEntries(given), ids);
}

const keyOf = (step, target) => JSON.stringify([step, target]);

async function answersTo(step, target) {
  const key = keyOf(step, target);
  if (answersOf.has(key)) return answersOf.get(key);
  const lists = listsOf(step);
  showSkeletons(lists);
  const begun = performance.now();
  // The server answers the lists of one question together.
  const answered = await Promise.all(lists.map((list) => found(step, target, { list, k: null })));
  const ms = Math.round(performance.now() - begun);
  noticeRestart(answered[0].server);
  const made = lists.map((list, place) => ({ ...list, ...answered[place], ms, isWhole: lists.length > 1 }));
  answersOf.set(key, made);
  if (answersOf.size > MOST_STEPS) answersOf.delete(answersOf.keys().next().value);
  return made;
}

// All that the server gives of the answers that are shown, once.
async function showFurther() {
  const [list] = shown;
  if (!list || list.isWhole) return;
  list.isWhole = true;
  $("further").hidden = true;
  const key = shownKey;
  try {
    const { answers } = await found(lastAsked(state), state.target, { list, k: health.most });
    const added = answers.slice(list.answers.length);
    list.answers = answers;
    if (key !== shownKey) return;
    const first = answers.length - added.length;
    $("results").append(...added.map((answer, place) => cardOf(answer, { place: first + place, list: 0 })));
    showMeasured();
    narrow();
  } catch (error) {
    list.isWhole = false;
    $("further").hidden = false;
    throw error;
  }
}

// What the page shows

async function show() {
  const step = last();
  showReferences(chosen());
  showLess(step);
  showSteps();
  showHow(step?.how);
  $("undo").disabled = state.depth === 0;
  $("past").hidden = !step && state.depth === 0;
  const asked = lastAsked(state);
  $("start").hidden = Boolean(step) || !health.examples;
  document.title = [asked?.text, t("Composed image retrieval")].filter(Boolean).join(" · ");
  const key = asked ? keyOf(asked, state.target) : "";
  if (key !== shownKey) {
    const number = (asking += 1);
    shownKey = key;
    $("choosing").open = !asked;
    try {
      const lists = asked ? await answersTo(asked, state.target) : [];
      if (number !== asking) return;
      showAnswers(lists);
    } catch (error) {
      if (number !== asking) return;
      showAnswers([]);
      toast(error.message);
    }
  }
  showLarge();
}

// The references, each with its button. What had the focus hands it on to what has its place, counted from the end, as
// the tile that adds one is the last.
function showReferences(references) {
  const buttons = () => [...$("reference").querySelectorAll("button")].reverse();
  const held = buttons().indexOf(document.activeElement);
  $("reference").removeAttribute("aria-busy");
  document.body.classList.toggle("has-reference", references.length > 0);
  $("reference").replaceChildren(...(references.length ? mosaicOf(references) : [nothingChosen()]));
  if (held >= 0) (buttons()[held] || $("upload")).focus();
}

function nothingChosen() {
  const empty = t("No reference: choose an image, upload or paste one, or drop it here. Or search by words alone.");
  const long = element("span", { className: "long", textContent: empty });
  const short = element("span", { className: "short", textContent: t("No reference") });
  return element("div", { className: "empty" }, long, short);
}

function mosaicOf(references) {
  const isSeveral = references.length > 1;
  const tiles = references.map((reference, place) => {
    const remove = element("button", { className: "corner", type: "button", textContent: "×" });
    remove.title = t("Remove {0}", reference.name);
    remove.setAttribute("aria-label", remove.title);
    remove.onclick = () => choose(references.toSpliced(place, 1));
    return element("li", { title: reference.name }, referenceImage(reference), remove);
  });
  if (references.length < health.references) {
    const another = element("button", { id: "add", type: "button", textContent: "+", onclick: () => pickFiles(true) });
    another.title = t("Add a reference: upload it, or drop or paste it here");
    another.setAttribute("aria-label", another.title);
    tiles.push(element("li", {}, another));
  }
  const called = isSeveral ? t("Mean of {0} references", references.length) : references[0].name;
  return [
    element("ul", { className: isSeveral ? "mosaic several" : "mosaic" }, ...tiles),
    element("figcaption", { textContent: called, title: called }),
  ];
}

function referenceImage(reference, size) {
  return element("img", { src: pictureOf(reference, size), alt: t("Reference: {0}", reference.name) });
}

// The image that answers are to look less like, which is taken off by its button.
function showLess(step) {
  const less = step?.less;
  $("less").hidden = !less;
  $("away").hidden = step?.references.length !== 1;
  if (!less) return;
  const image = element("img", { src: pictureOf(less), alt: "" });
  const words = element("span", { textContent: t("Less like {0}", less.name), title: less.name });
  const leave = element("button", { type: "button", textContent: "×", title: t("Forget it") });
  leave.setAttribute("aria-label", `${leave.title}: ${words.textContent}`);
  leave.onclick = () => {
    if (step.how) ask({ text: step.text, less: null });
    else choose(step.references, $("text").value, null);
  };
  $("less").replaceChildren(image, words, leave);
}

function showSteps() {
  const items = state.steps.map((step, place) => {
    const parts = step.references.map((image) => element("img", { src: pictureOf(image), alt: image.name }));
    const less = step.less && t("Less like {0}", step.less.name);
    const words = [step.text ? `“${step.text}”` : t("more like this"), less].filter(Boolean).join(" · ");
    if (step.how) parts.push(words);
    const back = element("button", { type: "button" }, ...parts);
    back.title = t("Back to: {0}", step.how ? words : namesOf(step.references));
    back.onclick = () => {
      $("text").value = step.text;
      go({ ...state, large: null, steps: state.steps.slice(0, place + 1) }, place === state.steps.length - 1);
    };
    return element("li", {}, back);
  });
  $("history").replaceChildren(...items);
}

function showHow(how) {
  if (how) {
    $("method").value = how.method;
    $("without").checked = how.without;
    $("filter").value = how.filter;
    $("mix").value = Math.round(100 * (how.mix ?? how.lean ?? 0.5));
  }
  const method = $("method").value;
  $("mixing").hidden = method !== "sum" && !leans(method);
  $("mixed").textContent = t(leans(method) ? "Image or text:" : "Text in the sum:");
  const share = $("mix").value;
  const towards = share < 50 ? "towards the image" : "towards the text";
  $("share").value = leans(method) ? t(share === "50" ? "as trained" : towards) : `${share} %`;
  $("mix").setAttribute("aria-valuetext", $("share").value);
}

function showSkeletons(lists) {
  $("answers").hidden = false;
  $("choosing").open = false;
  $("start").hidden = true;
  const { top } = $("answers").getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) $("answers").scrollIntoView();
  for (const id of ["note", "measured", "kept"]) $(id).textContent = "";
  $("within").value = "";
  $("further").hidden = true;
  $("experts").hidden = lists[0].mix !== null || health.composes !== "combiner";
  const waiting = () => element("li", { className: "card skeleton" }, element("div"), element("p", { textContent: "\u00a0" }));
  $("lists").setAttribute("aria-busy", "true");
  showLists(lists, () => Array.from({ length: health.k }, waiting));
  say(t("Searching"));
}

function showLists(lists, cardsOf) {
  $("lists").classList.toggle("side-by-side", lists.length > 1);
  const made = lists.map((list, place) => {
    const id = place ? `results-${list.key}` : "results";
    const grid = element("ol", { className: "grid results", id }, ...cardsOf(list, place));
    const title = lists.length > 1 ? [element("h3", { textContent: list.title })] : [];
    return element("section", { className: "list" }, ...title, grid);
  });
  $("lists").replaceChildren(...made);
}

function showAnswers(lists) {
  shown = lists;
  $("lists").removeAttribute("aria-busy");
  $("answers").hidden = !lists.length;
  $("within").value = "";
  showLists(lists, (list, place) => list.answers.map((answer, at) => cardOf(answer, { place: at, list: place })));
  $("note").textContent = [...new Set([unused(lists), ...lists.map((list) => list.note)])].filter(Boolean).join(" ");
  $("further").hidden = !lists.length || lists[0].isWhole || lists[0].answers.length < health.k;
  showMeasured();
  showExperts(lists[0]);
  showTarget();
  narrow();
  if (lists.length) say(lists.map((list) => t("{0} answers, {1}", list.answers.length, list.title)).join("; "));
}

// What a visitor has given and chosen not to ask with.
function unused(lists) {
  const asked = lastAsked(state);
  if (lists.length !== 1) return "";
  if (lists[0].mix === 0 && asked.text) return t("Asked with the image only: your words were not used.");
  return lists[0].mix === 1 && asked.references.length ? t("Asked with the text only: no reference was used.") : "";
}

function showMeasured() {
  const [list] = shown;
  if (!list) return;
  const values = [list.answers.length, health.images, list.ms].map(grouped);
  $("measured").textContent = t("{0} of {1} images, {2} ms", ...values);
}

// The card of an answer.
function cardOf(answer, at) {
  const of = shown[at.list];
  const place = t("{0} of {1}", at.place + 1, of.answers.length);
  const called = shown.length > 1 ? `${place}, ${of.title}` : place;
  const card = photoCard(answer, t("Answer {0}: {1}", called, answer.name), () => choose([referenceOf(answer)], ""));
  card.querySelector(".pick").title = t("Go on from it");
  const enlarge = element("button", { className: "corner enlarge", type: "button", textContent: "⤢" });
  enlarge.title = t("Open large");
  enlarge.setAttribute("aria-label", t("Open answer {0} large: {1}", called, answer.name));
  enlarge.onclick = () => go({ ...state, large: at });
  const number = element("span", { className: "quiet", textContent: `${at.place + 1}. ${answer.similarity.toFixed(3)} ` });
  card.querySelector(".pick").after(enlarge);
  card.append(element("p", { className: "caption", title: answer.name }, number, answer.name));
  card.dataset.path = answer.path.toLowerCase();
  card.classList.toggle("target", answer.row === state.target);
  return card;
}

// Hides the answers whose path has not what is typed, of all that the server gives.
function narrow() {
  const wanted = $("within").value.trim().toLowerCase();
  const cards = [...document.querySelectorAll("#lists .card:not(.skeleton)")];
  for (const card of cards) card.hidden = !card.dataset.path.includes(wanted);
  const kept = cards.filter((card) => !card.hidden).length;
  $("kept").value = wanted ? t("{0} of the nearest {1}", kept, cards.length) : "";
}

// What the gate and the experts did, in sentences and in bars.
function showExperts(list) {
  const isKnown = Boolean(list) && list.gate !== null;
  $("experts").hidden = !isKnown;
  if (!isKnown) return;
  const words = Math.round(100 * list.gate);
  const follow = lastAsked(state).references.length > 1
    ? "The results follow your words to {0} % and the references to {1} %."
    : "The results follow your words to {0} % and the reference to {1} %.";
  const said = [t(follow, words, 100 - words)];
  const working = list.experts.filter((share) => share > 0).length;
  const others = "{0} of {1} experts worked on this question. The others rest: every question goes to the {0} that suit it best.";
  if (working < list.experts.length) said.push(t(others, working, list.experts.length));
  const idle = health.experts.flatMap((expert, place) => (expert.is_idle ? [place + 1] : []));
  if (idle.length) said.push(t("Idle, as no question went to them when they were measured: experts {0}.", idle.join(", ")));
  $("why").textContent = said.join(" ");
  const shares = [[t("your words"), list.gate], ...list.experts.map((share, place) => [calledExpert(place), share])];
  const bars = shares.flatMap(([name, share]) => {
    const bar = element("i");
    bar.style.width = `${Math.round(100 * share)}%`;
    const value = share === 0 ? t("rests") : `${Math.round(100 * share)} %`;
    return [element("span", { textContent: name }), bar, element("span", { textContent: value })];
  });
  $("bars").replaceChildren(...bars);
}

// An expert by its number, and by what it takes where that is known.
function calledExpert(place) {
  const called = t("expert {0}", place + 1);
  const takes = health.experts[place]?.takes || [];
  return takes.length ? `${called}: ${takes.join(", ")}` : called;
}

// Where the image that is looked for stands in each list, once a visitor has said which it is.
function showTarget() {
  if (state.target === null) return;
  document.querySelectorAll(".list").forEach((section, at) => {
    const { place } = shown[at];
    const isFound = place !== null;
    const where = isFound
      ? t("The target is at place {0} of {1}", grouped(place), grouped(health.images))
      : t("The target is not among the first {0}", grouped(health.places));
    const forget = element("button", { type: "button", className: "forget", textContent: t("Forget it") });
    forget.onclick = () => go({ ...state, target: null });
    section.querySelector(".grid").before(element("p", { className: "place" }, element("span", { textContent: where }), forget));
  });
}

// The large view: an answer beside its references.

const enlarged = () => shown[state.large?.list]?.answers[state.large.place];

function showLarge() {
  const answer = enlarged();
  if (!answer) return $("large").close();
  const list = shown[state.large.list];
  const { references } = lastAsked(state);
  $("large-reference").hidden = !references.length;
  $("large-asked").replaceChildren(...references.map((reference) => referenceImage(reference, "large")));
  $("large-asked").classList.toggle("several", references.length > 1);
  $("large-called").textContent = t(references.length > 1 ? "References" : "Reference");
  $("also").hidden = !chosen().length || chosen().length >= health.references || isChosen(answer);
  $("large-image").src = picture(answer.row, "large");
  $("large-image").alt = answer.name;
  $("large-name").textContent = answer.name;
  const place = state.large.place + 1;
  $("large-about").textContent = t("Place {0}, {1}, similarity {2}", place, list.title, answer.similarity.toFixed(4));
  $("large-path").textContent = answer.path;
  $("target").textContent = t(answer.row === state.target ? "I look for this no more" : "This is what I look for");
  $("download").href = picture(answer.row, "large");
  $("download").download = `${answer.name.replace(/\.\w+$/, "")}.jpg`;
  $("previous").disabled = place === 1;
  $("next").disabled = place === list.answers.length;
  if (!$("large").open) $("large").showModal();
}

function turn(by) {
  const large = { ...state.large, place: state.large.place + by };
  if (shown[large.list].answers[large.place]) go({ ...state, large }, true);
}

// Leaves the entry of the history that the large view is.
function closeLarge() {
  if (!state.large) return;
  $("large").close();
  history.back();
}

async function copyPath() {
  try {
    await navigator.clipboard.writeText(enlarged().path);
    say(t("Copied"));
    $("copy").textContent = t("Copied");
    setTimeout(() => ($("copy").textContent = t("Copy path")), 1500);
  } catch {
    // Browsers copy on pages of this machine or by https alone.
    getSelection().selectAllChildren($("large-path"));
    toast(t("the browser does not let the page copy: the path is selected, copy it by Ctrl+C"));
  }
}

// Images to start from

const referenceOf = ({ row, name }) => ({ row, upload: null, name });

function photoCard(photo, alt, onclick) {
  const image = element("img", { src: picture(photo.row), alt, loading: "lazy", draggable: false });
  const pick = element("button", { className: "pick", type: "button", onclick }, image);
  const plus = element("button", { className: "corner plus", type: "button", textContent: "+" });
  plus.title = t("Add as reference");
  plus.setAttribute("aria-label", t("Add as reference: {0}", photo.name));
  plus.onclick = () => add(referenceOf(photo));
  const card = element("li", { className: "card", draggable: true }, pick, plus);
  card.ondragstart = (event) => event.dataTransfer.setData(ROW, JSON.stringify(referenceOf(photo)));
  return card;
}

function waitingCards(count) {
  return Array.from({ length: count }, () => element("li", { className: "card skeleton" }, element("div")));
}

async function offer() {
  const photos = await json(`some?count=${OFFERED}`);
  const cards = photos.map((photo, place) => {
    const alt = t("Image {0} of {1}: {2}", place + 1, photos.length, photo.name);
    return photoCard(photo, alt, () => choose([referenceOf(photo)]));
  });
  $("choice").replaceChildren(...cards);
}

async function offerExamples() {
  const cards = (await json(`examples?count=${EXAMPLES}`)).map(({ reference, text, target }) => {
    const start = async () => {
      await choose([referenceOf(reference)], text);
      await ask({ target: target.row });
    };
    const card = photoCard(reference, t("Example: {0}, “{1}”", reference.name, text), start);
    card.append(element("p", { textContent: `“${text}”`, title: text }));
    return card;
  });
  $("examples").replaceChildren(...cards);
}

// What the visitor does

function pickFiles(adds) {
  isAdding = adds;
  $("file").click();
}

// Files become references, beside those that are there or in their place. What cannot be taken is told of each.
async function takeFiles(files, adds) {
  const taken = fitting([...files], adds ? chosen() : []);
  $("reference").setAttribute("aria-busy", "true");
  say(t("Sending…"));
  const sent = await Promise.all(taken.map(async (file) => {
    const upload = await tell(takeUpload(file));
    return upload ? [{ row: null, upload, name: file.name || "pasted.png" }] : [];
  }));
  const references = sent.flat();
  if (!references.length) return showReferences(chosen());
  return choose(adds ? [...chosen(), ...references] : references);
}

// Whether what is dropped or pasted is for the tile that adds a reference: elsewhere it takes the place of all.
const isAdded = (event) => Boolean(event.target.closest?.("#add"));

function takeDropped(event) {
  event.preventDefault();
  document.body.classList.remove("dragged");
  const own = event.dataTransfer.getData(ROW);
  const { files } = event.dataTransfer;
  if (own && isAdded(event)) add(JSON.parse(own));
  else if (own) choose([JSON.parse(own)]);
  else if (files.length) takeFiles(files, isAdded(event));
  else toast(t("only files and images of this page are taken: nothing is fetched from an address"));
}

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

function press(event) {
  if (state.large) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) turn(by);
    return;
  }
  moveInGrid(event);
  if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("text").focus();
  }
}

function askAgain() {
  showHow(null);
  if (last()?.how) ask({ text: last().text, replaces: true });
}

function save(content, name) {
  const link = element("a", { href: URL.createObjectURL(content), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

function exportAnswers() {
  const { text, less, how, ...asked } = lastAsked(state);
  const lists = shown.map(({ title, place, answers }) => ({ asked_with: title, place_of_target: place, answers }));
  const references = asked.references.map(({ name, row }) => ({ name, row }));
  const question = { references, less: less?.name ?? null, less_row: less?.row ?? null, text, ...how };
  const written = JSON.stringify({ ...question, target: state.target, lists }, null, 2);
  save(new Blob([written], { type: "application/json" }), "answers.json");
}

// What was asked with and as many answers as come at first, as a picture of one of two kinds.
async function exportFigure(kind) {
  const { references, text, less } = lastAsked(state);
  const [{ mix }] = shown;
  const lists = shown.map(({ title, answers }) => {
    const first = answers.slice(0, health.k);
    return { title, answers: first.map(({ row }) => ({ address: picture(row), isTarget: row === state.target })) };
  });
  const svg = await figure({
    references: mix === 1 ? [] : references.map((reference) => pictureOf(reference)),
    text: mix !== 0 ? text : "",
    less: less ? pictureOf(less) : null,
    lists,
  });
  save(kind === "png" ? await asPng(svg) : new Blob([svg], { type: "image/svg+xml" }), `answers.${kind}`);
}

function startOver() {
  $("text").value = "";
  $("method").value = "pair";
  $("mix").value = 50;
  $("without").checked = true;
  $("filter").value = "";
  go({ ...START, depth: state.depth });
}

function listen() {
  $("question").onsubmit = (event) => {
    event.preventDefault();
    ask();
  };
  $("undo").onclick = () => history.back();
  $("restart").onclick = startOver;
  $("upload").onclick = () => pickFiles(false);
  $("file").onchange = () => {
    takeFiles($("file").files, isAdding);
    $("file").value = "";
  };
  for (const id of ["mix", "without", "filter"]) $(id).onchange = askAgain;
  $("method").onchange = () => {
    $("mix").value = 50;
    askAgain();
  };
  $("away").onclick = () => choose([], $("text").value, chosen()[0]);
  $("mix").oninput = () => showHow(null);
  $("within").oninput = () => {
    narrow();
    tell(showFurther());
  };
  $("further").onclick = () => tell(showFurther());
  document.addEventListener("scroll", () => {
    if (!$("further").hidden && $("further").getBoundingClientRect().top < innerHeight) tell(showFurther());
  });
  $("export").onclick = exportAnswers;
  for (const kind of ["png", "svg"]) $(kind).onclick = () => tell(exportFigure(kind));
  $("more").onclick = () => tell(offer());
  $("use").onclick = () => choose([referenceOf(enlarged())], "");
  $("also").onclick = () => add(referenceOf(enlarged()));
  $("alike").onclick = async () => {
    await choose([referenceOf(enlarged())], "");
    await ask();
  };
  $("unlike").onclick = async () => {
    const less = referenceOf(enlarged());
    await go({ ...state, large: null }, true);
    await ask({ less, replaces: true });
  };
  $("target").onclick = () => {
    const { row } = enlarged();
    go({ ...state, large: null, target: row === state.target ? null : row }, true);
  };
  $("previous").onclick = () => turn(-1);
  $("next").onclick = () => turn(1);
  $("copy").onclick = copyPath;
  $("close").onclick = closeLarge;
  $("large").onclick = (event) => {
    if (event.target === $("large")) closeLarge();
  };
  $("large").oncancel = (event) => {
    event.preventDefault();
    closeLarge();
  };
  document.addEventListener("keydown", press);
  document.addEventListener("paste", (event) => {
    const { files } = event.clipboardData;
    if (files.length) takeFiles(files, isAdded(event));
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragged");
  });
  document.addEventListener("dragleave", () => document.body.classList.remove("dragged"));
  document.addEventListener("drop", takeDropped);
  document.addEventListener("visibilitychange", () => tell(look()));
  setInterval(() => tell(look()), LOOKED_EVERY);
  addEventListener("popstate", (event) => {
    state = event.state || START;
    $("text").value = last()?.text || "";
    show();
  });
  // What is scrolled to stands below the question, where that stays in view.
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--bar", `${$("question").offsetHeight}px`);
  }).observe($("question"));
}

// The question that the page's address holds, as far as this index can answer it.
async function linked() {
  const words = new URLSearchParams(location.search);
  const share = (name) => Math.min(1, Math.max(0, Number(words.get(name) ?? 0.5) || 0));
  const photosOf = async (rows) => {
    const photos = await Promise.all(rows.map((row) => isRow(row) && json(`photo/${row}`).catch(() => null)));
    if (!photos.every(Boolean)) toast(t("the link names an image that the index does not have: choose another"));
    return photos.filter(Boolean).map(referenceOf);
  };
  const references = await photosOf(words.getAll("row").slice(0, health.references));
  const [less] = await photosOf(words.getAll("less").slice(0, 1));
  const step = { references, less, how: null };
  step.text = words.get("text")?.trim() || "";
  const wanted = words.get("method") || "pair";
  const method = [...$("method").options].some((option) => option.value === wanted) ? wanted : "pair";
  const how = { method, without: words.get("without") !== "0", filter: words.get("filter") || "" };
  if (method === "sum") how.mix = share("mix");
  if (leans(method) && words.has("lean")) how.lean = share("lean");
  if (how.filter && !health.filters) {
    how.filter = "";
    toast(t("this index takes no filter: the link's was left out"));
  }
  const isAsked = words.has("text") || method === "image";
  if (isAsked && (step.text || references.length)) step.how = how;
  const target = isRow(words.get("target")) ? words.get("target") : null;
  return step.how || references.length ? { ...START, steps: [step], target } : START;
}

async function begin() {
  translate();
  listen();
  $("options").open = matchMedia("(min-width: 761px)").matches;
  showReferences([]);
  health = await json("health");
  const kind = health.composes === "combiner" ? [health.model, "Combiner"] : [health.model];
  const facts = kind.length > 1 ? "{0} with a {1} · {2} images" : "{0} · {1} images";
  const said = [t(facts, ...kind, grouped(health.images)), health.measured];
  $("facts").textContent = said.filter(Boolean).join(" · ");
  $("file").accept = health.kinds.join(",");
  $("filtering").hidden = !health.filters;
  $("method").options[0].textContent = t(health.composes === "sum" ? "sum, as trained" : "Combiner");
  $("examples").replaceChildren(...waitingCards(Math.min(EXAMPLES, health.examples)));
  $("choice").replaceChildren(...waitingCards(OFFERED));
  $("choosing").hidden = false;
  for (const { references, less } of history.state?.steps || []) {
    for (const image of [...references, less]) if (image?.upload) bringBack(image.upload);
  }
  state = history.state ? { ...START, ...history.state } : await linked();
  history.replaceState(state, "", addressOf(state));
  $("text").value = last()?.text || "";
  $("choosing").open = !lastAsked(state);
  const offered = Promise.all([tell(offer()), health.examples ? tell(offerExamples()) : null]);
  await show();
  await offered;
}

tell(begin());
