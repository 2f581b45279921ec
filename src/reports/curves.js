// Draws each of `panels` in its place, and answers the pointer and the arrow keys with the values at an epoch.
const WIDTH = 460, HEIGHT = 270, LEFT = 48, RIGHT = 12, TOP = 8, BOTTOM = 36;
const HUES = [212, 22, 145, 285, 345, 48, 182, 95];
const MOST_MARKED = 60;

function add(parent, name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

// At most about `count` round numbers between two.
function ticks(low, high, count, least = 0) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, [1, 2, 5, 10].find(factor => factor * power >= rough) * power);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step / 1e6; n++) found.push(n * step);
  return found;
}

function chart(place, { digits, epochs, series }) {
  const names = Object.keys(series);
  const shown = new Set(names);
  const colour = name => `hsl(${HUES[names.indexOf(name) % HUES.length]} 68% var(--curve))`;
  const dashes = name => (names.indexOf(name) < HUES.length ? "none" : "5 3");
  const svg = place.querySelector("svg");
  const legend = place.querySelector(".legend");
  const told = {};
  let at = epochs.length - 1;
  let first = epochs[0], last = epochs.at(-1);
  if (first === last) [first, last] = [first - 1, last + 1];
  const x = epoch => LEFT + ((epoch - first) / (last - first)) * (WIDTH - LEFT - RIGHT);

  function draw() {
    svg.replaceChildren();
    const values = names.filter(name => shown.has(name)).flatMap(name => series[name]);
    const known = values.filter(value => value !== null);
    let low = Math.min(...known), high = Math.max(...known);
    if (!known.length) [low, high] = [0, 1];
    const spare = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
    [low, high] = [low - spare, high + spare];
    const y = value => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    for (const tick of ticks(low, high, 5)) {
      add(svg, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick), class: "rule" });
      const text = String(Number(tick.toPrecision(6)));
      add(svg, "text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, text);
    }
    for (const tick of ticks(epochs[0], epochs.at(-1) || 1, 6, 1).filter(tick => tick <= epochs.at(-1)))
      add(svg, "text", { x: x(tick), y: HEIGHT - 20, "text-anchor": "middle" }, String(tick));
    add(svg, "text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "epoch");
    add(svg, "line", { x1: x(epochs[at]), x2: x(epochs[at]), y1: TOP, y2: HEIGHT - BOTTOM, class: "at" });
    for (const name of names) {
      const there = epochs.map((epoch, row) => [x(epoch), series[name][row], row]).filter(p => p[1] !== null);
      const value = series[name][at];
      told[name].textContent = value === null ? "–" : value.toFixed(digits);
      if (!shown.has(name)) continue;
      const points = there.map(([left, of]) => `${left},${y(of)}`).join(" ");
      add(svg, "polyline", { points, stroke: colour(name), "stroke-dasharray": dashes(name) });
      for (const [left, of, row] of there)
        if (row === at || epochs.length <= MOST_MARKED)
          add(svg, "circle", { cx: left, cy: y(of), r: row === at ? 4 : 2, fill: colour(name) });
    }
    place.querySelector("figcaption b").textContent = `epoch ${epochs[at]}`;
  }

  function move(to) {
    at = Math.min(Math.max(to, 0), epochs.length - 1);
    draw();
  }

  for (const name of names) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const mark = document.createElement("i");
    mark.style.background = colour(name);
    told[name] = document.createElement("output");
    button.append(mark, name, " ", told[name]);
    button.addEventListener("click", () => {
      shown.delete(name) || shown.add(name);
      button.setAttribute("aria-pressed", String(shown.has(name)));
      draw();
    });
    legend.append(button);
  }
  const follow = event => {
    const box = svg.getBoundingClientRect();
    const left = ((event.clientX - box.left) / box.width) * WIDTH;
    const distances = epochs.map(epoch => Math.abs(x(epoch) - left));
    move(distances.indexOf(Math.min(...distances)));
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", () => move(epochs.length - 1));
  svg.addEventListener("keydown", event => {
    const steps = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: epochs.length - 1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    move(steps[event.key]);
  });
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  draw();
}

document.querySelectorAll("figure.chart").forEach((place, number) => chart(place, panels[number]));
