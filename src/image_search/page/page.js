// The search page. Its content consists of text nodes and attributes, never of parsed HTML, so no file name or text can
// run as code. The content is determined by `state`, and each entry of the browser's history contains one state:
// undo is the browser's back button, and a link or a reload opens the same query again.
import { asPng, figure } from "./figure.js";
import { bringBack, json, search, takeUpload, uploadedPicture } from "./server.js";
import { grouped, t, translate } from "./words.js";

const MOST_STEPS = 50;
const LOOKED_EVERY = 15000; // ms between checks that the server still responds
const OFFERED = 24; // number of images to choose a reference from
const EXAMPLES = 4;
const ROW = "application/x-row"; // data type of an image dragged from the page itself
const TITLES = { sum: "Sum", image: "Image only", text: "Text only" };
const SHARES = { image: 0, text: 1 }; // weight of the text in a search by image only or text only

// steps: the queries so far; the last step may contain references that were not searched with yet, and its `how` is
// null. A reference is { row, upload, name }, as is the `less` of a step: an image that results should resemble less.
// target: row of the target. large: { list, index } of the enlarged result. depth: number of earlier history entries.
const START = { steps: [], depth: 0, target: null, large: null };

let health = {
  server: "", composes: "sum", images: 0, k: 12, max_k: 12, max_references: 1, kinds: [], filters: false, experts: [],
};
let state = START;
let shownKey = ""; // key of the query whose results are on the page
let shown = []; // lists of results on the page
let isAdding = false; // whether picked files are added to the references or replace them
let searches = 0; // number of the latest search; results of earlier searches are discarded
const resultsOf = new Map(); // query as JSON -> lists of results, for the back button

const $ = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Messages

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
  const reload = { name: t("Reload"), run: () => location.reload() };
  toast(t("The server was restarted: image numbers may have changed."), reload);
}

async function look() {
  if (!document.hidden) noticeRestart((await json("health")).server);
}

const picture = (row, size = "small") => `image/${row}?size=${size}&of=${health.server}`;

// Steps

const last = () => state.steps.at(-1);
const lastQuery = (of) => of.steps.findLast((step) => step.how);
const chosen = () => last()?.references ?? [];
const isChosen = (photo) => chosen().some(({ row }) => row === photo.row);
const isRow = (text) => /^\d{1,19}$/.test(text);
// Returns whether the slider shifts the Combiner's gate.
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

// Shows another state, as a new entry of the history or in place of the current entry.
function go(next, replaces = false) {
  const made = { ...next, depth: replaces ? state.depth : state.depth + 1 };
  if (replaces) history.replaceState(made, "", addressOf(made));
  else history.pushState(made, "", addressOf(made));
  state = made;
  return show();
}

// Chooses references, which replace references that were not searched with, and closes the enlarged result.
function choose(references, text = $("text").value, less = last()?.less) {
  const kept = isPending() ? state.steps.slice(0, -1) : state.steps;
  const steps = [...kept, { references, less, text, how: null }].slice(-MOST_STEPS);
  const replaces = isPending() || state.large !== null;
  $("text").value = text;
  say(namesOf(references));
  return go({ ...state, steps, large: null }, replaces);
}

// Returns the first images, as many as can be added to the references that stay.
function fitting(images, kept) {
  const room = Math.max(0, health.max_references - kept.length);
  if (images.length > room) toast(t("at most {0} references: remove one to add another", health.max_references));
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
  if (leans(method) && share !== 0.5) how.lean = share; // in the middle, the gate is as trained
  return how;
}

// Searches, and shows the results. If the search fails, the page and the typed text stay unchanged.
async function runSearch({
  text = $("text").value.trim(), less = last()?.less, replaces = isPending(), target = state.target,
} = {}) {
  const step = { references: chosen(), less, text, how: chosenHow() };
  const next = { ...state, target, large: null, steps: [...state.steps.slice(0, -1), step] };
  const number = (searches += 1);
  try {
    await resultsFor(step, target);
    if (number !== searches) return;
    const isSame = last()?.how && keyOf(last(), state.target) === keyOf(step, target);
    await go(next, replaces || isSame);
  } catch (error) {
    if (number !== searches) return;
    toast(error.message);
    shownKey = "";
    await show();
  }
}

// Queries

// Returns the lists of results to request: one list, or several to show side by side. Without a text or without a
// reference, there is only one way to search, whatever method was chosen.
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

// Requests the results of a list: k of them, or the server's default number if k is null.
function fetchResults(step, target, { list, k }) {
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

async function resultsFor(step, target) {
  const key = keyOf(step, target);
  if (resultsOf.has(key)) return resultsOf.get(key);
  const lists = listsOf(step);
  showSkeletons(lists);
  const begun = performance.now();
  // The server computes the lists of one query in one batch.
  const fetched = await Promise.all(lists.map((list) => fetchResults(step, target, { list, k: null })));
  const ms = Math.round(performance.now() - begun);
  noticeRestart(fetched[0].server);
  const made = lists.map((list, index) => ({ ...list, ...fetched[index], ms, isWhole: lists.length > 1 }));
  resultsOf.set(key, made);
  if (resultsOf.size > MOST_STEPS) resultsOf.delete(resultsOf.keys().next().value);
  return made;
}

// Shows all results that the server returns for the query on the page, once.
async function showFurther() {
  const [list] = shown;
  if (!list || list.isWhole) return;
  list.isWhole = true;
  $("further").hidden = true;
  const key = shownKey;
  try {
    const { results } = await fetchResults(lastQuery(state), state.target, { list, k: health.max_k });
    const added = results.slice(list.results.length);
    list.results = results;
    if (key !== shownKey) return;
    const first = results.length - added.length;
    $("results").append(...added.map((result, index) => cardOf(result, { index: first + index, list: 0 })));
    showMeasured();
    narrow();
  } catch (error) {
    list.isWhole = false;
    $("further").hidden = false;
    throw error;
  }
}

// Content of the page

async function show() {
  const step = last();
  showReferences(chosen());
  showLess(step);
  showSteps();
  showHow(step?.how);
  $("undo").disabled = state.depth === 0;
  $("past").hidden = !step && state.depth === 0;
  const query = lastQuery(state);
  $("start").hidden = Boolean(step) || !health.examples;
  document.title = [query?.text, t("Composed image retrieval")].filter(Boolean).join(" · ");
  const key = query ? keyOf(query, state.target) : "";
  if (key !== shownKey) {
    const number = (searches += 1);
    shownKey = key;
    $("choosing").open = !query;
    try {
      const lists = query ? await resultsFor(query, state.target) : [];
      if (number !== searches) return;
      showResults(lists);
    } catch (error) {
      if (number !== searches) return;
      showResults([]);
      toast(error.message);
    }
  }
  showLarge();
}

// Shows the references, each with its button. If a button had the focus, the button that is now at its position has it,
// counted from the end, because the last tile is the one that adds a reference.
function showReferences(references) {
  const buttons = () => [...$("reference").querySelectorAll("button")].reverse();
  const held = buttons().indexOf(document.activeElement);
  $("reference").removeAttribute("aria-busy");
  document.body.classList.toggle("has-reference", references.length > 0);
  $("reference").replaceChildren(...(references.length ? mosaicOf(references) : [nothingChosen()]));
  if (held >= 0) (buttons()[held] || $("upload")).focus();
}

function nothingChosen() {
  const empty = t("No reference: choose an image, upload or paste one, or drop it here. Or search with text only.");
  const long = element("span", { className: "long", textContent: empty });
  const short = element("span", { className: "short", textContent: t("No reference") });
  return element("div", { className: "empty" }, long, short);
}

function mosaicOf(references) {
  const isSeveral = references.length > 1;
  const tiles = references.map((reference, index) => {
    const remove = element("button", { className: "corner", type: "button", textContent: "×" });
    remove.title = t("Remove {0}", reference.name);
    remove.setAttribute("aria-label", remove.title);
    remove.onclick = () => choose(references.toSpliced(index, 1));
    return element("li", { title: reference.name }, referenceImage(reference), remove);
  });
  if (references.length < health.max_references) {
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

// Shows the image that results should resemble less, with a button to remove it.
function showLess(step) {
  const less = step?.less;
  $("less").hidden = !less;
  $("away").hidden = step?.references.length !== 1;
  if (!less) return;
  const image = element("img", { src: pictureOf(less), alt: "" });
  const words = element("span", { textContent: t("Less like {0}", less.name), title: less.name });
  const remove = element("button", { type: "button", textContent: "×", title: t("Remove") });
  remove.setAttribute("aria-label", `${remove.title}: ${words.textContent}`);
  remove.onclick = () => {
    if (step.how) runSearch({ text: step.text, less: null });
    else choose(step.references, $("text").value, null);
  };
  $("less").replaceChildren(image, words, remove);
}

function showSteps() {
  const items = state.steps.map((step, index) => {
    const parts = step.references.map((image) => element("img", { src: pictureOf(image), alt: image.name }));
    const less = step.less && t("Less like {0}", step.less.name);
    const words = [step.text ? `“${step.text}”` : t("more like this"), less].filter(Boolean).join(" · ");
    if (step.how) parts.push(words);
    const back = element("button", { type: "button" }, ...parts);
    back.title = t("Back to: {0}", step.how ? words : namesOf(step.references));
    back.onclick = () => {
      $("text").value = step.text;
      go({ ...state, large: null, steps: state.steps.slice(0, index + 1) }, index === state.steps.length - 1);
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
  $("results-section").hidden = false;
  $("choosing").open = false;
  $("start").hidden = true;
  const { top } = $("results-section").getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) $("results-section").scrollIntoView();
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
  const made = lists.map((list, index) => {
    const id = index ? `results-${list.key}` : "results";
    const grid = element("ol", { className: "grid results", id }, ...cardsOf(list, index));
    const title = lists.length > 1 ? [element("h3", { textContent: list.title })] : [];
    return element("section", { className: "list" }, ...title, grid);
  });
  $("lists").replaceChildren(...made);
}

function showResults(lists) {
  shown = lists;
  $("lists").removeAttribute("aria-busy");
  $("results-section").hidden = !lists.length;
  $("within").value = "";
  showLists(lists, (list, at) => list.results.map((result, index) => cardOf(result, { index, list: at })));
  $("note").textContent = [...new Set([unused(lists), ...lists.map((list) => list.note)])].filter(Boolean).join(" ");
  $("further").hidden = !lists.length || lists[0].isWhole || lists[0].results.length < health.k;
  showMeasured();
  showExperts(lists[0]);
  showTarget();
  narrow();
  if (lists.length) say(lists.map((list) => t("{0} results, {1}", list.results.length, list.title)).join("; "));
}

// Returns a note on a text or references that the chosen method does not use.
function unused(lists) {
  const query = lastQuery(state);
  if (lists.length !== 1) return "";
  if (lists[0].mix === 0 && query.text) return t("Searched with the image only: your text was not used.");
  return lists[0].mix === 1 && query.references.length ? t("Searched with the text only: no reference was used.") : "";
}

function showMeasured() {
  const [list] = shown;
  if (!list) return;
  const values = [list.results.length, health.images, list.ms].map(grouped);
  $("measured").textContent = t("{0} of {1} images, {2} ms", ...values);
}

// Returns the card of a result; at: its { list, index }.
function cardOf(result, at) {
  const of = shown[at.list];
  const rank = t("{0} of {1}", at.index + 1, of.results.length);
  const called = shown.length > 1 ? `${rank}, ${of.title}` : rank;
  const card = photoCard(result, t("Result {0}: {1}", called, result.name), () => choose([referenceOf(result)], ""));
  card.querySelector(".pick").title = t("Continue from this result");
  const enlarge = element("button", { className: "corner enlarge", type: "button", textContent: "⤢" });
  enlarge.title = t("Enlarge");
  enlarge.setAttribute("aria-label", t("Enlarge result {0}: {1}", called, result.name));
  enlarge.onclick = () => go({ ...state, large: at });
  const number = element("span", { className: "quiet", textContent: `${at.index + 1}. ${result.similarity.toFixed(3)} ` });
  card.querySelector(".pick").after(enlarge);
  card.append(element("p", { className: "caption", title: result.name }, number, result.name));
  card.dataset.path = result.path.toLowerCase();
  card.classList.toggle("target", result.row === state.target);
  return card;
}

// Hides the results whose path does not contain the typed text.
function narrow() {
  const wanted = $("within").value.trim().toLowerCase();
  const cards = [...document.querySelectorAll("#lists .card:not(.skeleton)")];
  for (const card of cards) card.hidden = !card.dataset.path.includes(wanted);
  const kept = cards.filter((card) => !card.hidden).length;
  $("kept").value = wanted ? t("{0} of the {1} nearest images", kept, cards.length) : "";
}

// Shows the gate and the weights of the experts, in sentences and as bars.
function showExperts(list) {
  const isKnown = Boolean(list) && list.gate !== null;
  $("experts").hidden = !isKnown;
  if (!isKnown) return;
  const words = Math.round(100 * list.gate);
  const follow = lastQuery(state).references.length > 1
    ? "The results depend {0} % on your text and {1} % on the references."
    : "The results depend {0} % on your text and {1} % on the reference.";
  const said = [t(follow, words, 100 - words)];
  const working = list.experts.filter((share) => share > 0).length;
  const others = "{0} of {1} experts processed this query: each query is routed to the {0} experts that suit it best.";
  if (working < list.experts.length) said.push(t(others, working, list.experts.length));
  const idle = health.experts.flatMap((expert, index) => (expert.is_idle ? [index + 1] : []));
  if (idle.length) said.push(t("Idle experts, to which no query was routed in the evaluation: {0}.", idle.join(", ")));
  $("why").textContent = said.join(" ");
  const shares = [[t("your text"), list.gate], ...list.experts.map((share, index) => [calledExpert(index), share])];
  const bars = shares.flatMap(([name, share]) => {
    const bar = element("i");
    bar.style.width = `${Math.round(100 * share)}%`;
    const value = share === 0 ? t("not used") : `${Math.round(100 * share)} %`;
    return [element("span", { textContent: name }), bar, element("span", { textContent: value })];
  });
  $("bars").replaceChildren(...bars);
}

// Returns the number of an expert, and the words of its typical queries if they are known.
function calledExpert(index) {
  const called = t("expert {0}", index + 1);
  const takes = health.experts[index]?.takes || [];
  return takes.length ? `${called}: ${takes.join(", ")}` : called;
}

// Shows the rank of the target in each list, if the user has marked a target.
function showTarget() {
  if (state.target === null) return;
  document.querySelectorAll(".list").forEach((section, at) => {
    const { rank } = shown[at];
    const isFound = rank !== null;
    const where = isFound
      ? t("The target is at rank {0} of {1}", grouped(rank), grouped(health.images))
      : t("The target is not among the first {0}", grouped(health.rank_depth));
    const forget = element("button", { type: "button", className: "forget", textContent: t("Remove target") });
    forget.onclick = () => go({ ...state, target: null });
    section.querySelector(".grid").before(element("p", { className: "rank" }, element("span", { textContent: where }), forget));
  });
}

// The enlarged result, next to its references

const enlarged = () => shown[state.large?.list]?.results[state.large.index];

function showLarge() {
  const result = enlarged();
  if (!result) return $("large").close();
  const list = shown[state.large.list];
  const { references } = lastQuery(state);
  $("large-reference").hidden = !references.length;
  $("large-reference-images").replaceChildren(...references.map((reference) => referenceImage(reference, "large")));
  $("large-reference-images").classList.toggle("several", references.length > 1);
  $("large-called").textContent = t(references.length > 1 ? "References" : "Reference");
  $("also").hidden = !chosen().length || chosen().length >= health.max_references || isChosen(result);
  $("large-image").src = picture(result.row, "large");
  $("large-image").alt = result.name;
  $("large-name").textContent = result.name;
  const rank = state.large.index + 1;
  $("large-about").textContent = t("Rank {0}, {1}, similarity {2}", rank, list.title, result.similarity.toFixed(4));
  $("large-path").textContent = result.path;
  $("target").textContent = t(result.row === state.target ? "Remove target" : "Mark as target");
  $("download").href = picture(result.row, "large");
  $("download").download = `${result.name.replace(/\.\w+$/, "")}.jpg`;
  $("previous").disabled = rank === 1;
  $("next").disabled = rank === list.results.length;
  if (!$("large").open) $("large").showModal();
}

function turn(by) {
  const large = { ...state.large, index: state.large.index + by };
  if (shown[large.list].results[large.index]) go({ ...state, large }, true);
}

// Closes the enlarged result and leaves its entry of the history.
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
    // Browsers allow copying only on pages from this machine or over HTTPS.
    getSelection().selectAllChildren($("large-path"));
    toast(t("the browser does not allow copying: the path is selected, press Ctrl+C to copy it"));
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
  const cards = photos.map((photo, index) => {
    const alt = t("Image {0} of {1}: {2}", index + 1, photos.length, photo.name);
    return photoCard(photo, alt, () => choose([referenceOf(photo)]));
  });
  $("choice").replaceChildren(...cards);
}

async function offerExamples() {
  const cards = (await json(`examples?count=${EXAMPLES}`)).map(({ reference, text, target }) => {
    const start = async () => {
      await choose([referenceOf(reference)], text);
      await runSearch({ target: target.row });
    };
    const card = photoCard(reference, t("Example: {0}, “{1}”", reference.name, text), start);
    card.append(element("p", { textContent: `“${text}”`, title: text }));
    return card;
  });
  $("examples").replaceChildren(...cards);
}

// Actions of the user

function pickFiles(adds) {
  isAdding = adds;
  $("file").click();
}

// Adds files to the references, or replaces the references with them. Each invalid file is reported.
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

// Returns whether an image was dropped or pasted on the tile that adds a reference; elsewhere, it replaces all.
const isAdded = (event) => Boolean(event.target.closest?.("#add"));

function takeDropped(event) {
  event.preventDefault();
  document.body.classList.remove("dragged");
  const own = event.dataTransfer.getData(ROW);
  const { files } = event.dataTransfer;
  if (own && isAdded(event)) add(JSON.parse(own));
  else if (own) choose([JSON.parse(own)]);
  else if (files.length) takeFiles(files, isAdded(event));
  else toast(t("only files and images from this page are accepted: URLs are not fetched"));
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

function searchAgain() {
  showHow(null);
  if (last()?.how) runSearch({ text: last().text, replaces: true });
}

function save(content, name) {
  const link = element("a", { href: URL.createObjectURL(content), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

function exportResults() {
  const { references: chosenReferences, text, less, how } = lastQuery(state);
  const lists = shown.map(({ title, rank, results }) => ({ searched_with: title, rank_of_target: rank, results }));
  const references = chosenReferences.map(({ name, row }) => ({ name, row }));
  const query = { references, less: less?.name ?? null, less_row: less?.row ?? null, text, ...how };
  const written = JSON.stringify({ ...query, target: state.target, lists }, null, 2);
  save(new Blob([written], { type: "application/json" }), "results.json");
}

// Saves a picture, "png" or "svg", of the query and the first results.
async function exportFigure(kind) {
  const { references, text, less } = lastQuery(state);
  const [{ mix }] = shown;
  const lists = shown.map(({ title, results }) => {
    const first = results.slice(0, health.k);
    return { title, results: first.map(({ row }) => ({ address: picture(row), isTarget: row === state.target })) };
  });
  const svg = await figure({
    references: mix === 1 ? [] : references.map((reference) => pictureOf(reference)),
    text: mix !== 0 ? text : "",
    less: less ? pictureOf(less) : null,
    lists,
  });
  save(kind === "png" ? await asPng(svg) : new Blob([svg], { type: "image/svg+xml" }), `results.${kind}`);
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
  $("query").onsubmit = (event) => {
    event.preventDefault();
    runSearch();
  };
  $("undo").onclick = () => history.back();
  $("restart").onclick = startOver;
  $("upload").onclick = () => pickFiles(false);
  $("file").onchange = () => {
    takeFiles($("file").files, isAdding);
    $("file").value = "";
  };
  for (const id of ["mix", "without", "filter"]) $(id).onchange = searchAgain;
  $("method").onchange = () => {
    $("mix").value = 50;
    searchAgain();
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
  $("export").onclick = exportResults;
  for (const kind of ["png", "svg"]) $(kind).onclick = () => tell(exportFigure(kind));
  $("more").onclick = () => tell(offer());
  $("use").onclick = () => choose([referenceOf(enlarged())], "");
  $("also").onclick = () => add(referenceOf(enlarged()));
  $("alike").onclick = async () => {
    await choose([referenceOf(enlarged())], "");
    await runSearch();
  };
  $("unlike").onclick = async () => {
    const less = referenceOf(enlarged());
    await go({ ...state, large: null }, true);
    await runSearch({ less, replaces: true });
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
  // On narrow screens the query stays in view; content that is scrolled to appears below it.
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--bar", `${$("query").offsetHeight}px`);
  }).observe($("query"));
}

// Returns the state in the page's address, without images and filters that this index does not support.
async function linked() {
  const words = new URLSearchParams(location.search);
  const share = (name) => Math.min(1, Math.max(0, Number(words.get(name) ?? 0.5) || 0));
  const photosOf = async (rows) => {
    const photos = await Promise.all(rows.map((row) => isRow(row) && json(`photo/${row}`).catch(() => null)));
    if (!photos.every(Boolean)) toast(t("the link refers to an image that is not in the index: choose another image"));
    return photos.filter(Boolean).map(referenceOf);
  };
  const references = await photosOf(words.getAll("row").slice(0, health.max_references));
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
    toast(t("this index does not support filters: the filter in the link was ignored"));
  }
  const isQuery = words.has("text") || method === "image";
  if (isQuery && (step.text || references.length)) step.how = how;
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
  $("method").options[0].textContent = t(health.composes === "sum" ? "sum, as in training" : "Combiner");
  $("examples").replaceChildren(...waitingCards(Math.min(EXAMPLES, health.examples)));
  $("choice").replaceChildren(...waitingCards(OFFERED));
  $("choosing").hidden = false;
  for (const { references, less } of history.state?.steps || []) {
    for (const image of [...references, less]) if (image?.upload) bringBack(image.upload);
  }
  state = history.state ? { ...START, ...history.state } : await linked();
  history.replaceState(state, "", addressOf(state));
  $("text").value = last()?.text || "";
  $("choosing").open = !lastQuery(state);
  const offered = Promise.all([tell(offer()), health.examples ? tell(offerExamples()) : null]);
  await show();
  await offered;
}

tell(begin());
