// What the second network draws by itself when it is seen: the guidance strip, and the emoji at the end.

import { $, follow } from "./common.js";
import { included } from "./networks.js";
import { drawImages } from "./plane.js";
import { guided, noiseOf, sampleProgressive } from "./sampler.js";

const STEPS = 10, SHAPE = [3, 32, 32], SIZE = 3072;
const STRIP = [0, 0.5, 1, 2, 4], NINE = 9; // the guidance of the strip, and its pictures at each
const COUNT = 36, AT_ONCE = 6; // emoji at the end, and how many emerge at the same time

/** Draw pictures of the classes y from xT with guidance w. show(x): x_t at first, and the estimates at the end.
 * Returns the pictures. */
async function emerge(network, xT, y, w, show) {
  let last;
  const options = { sampler: "sa-solver", steps: STEPS, xT };
  for await (last of sampleProgressive(guided(network, y, w), null, network.betas, options)) {
    show(last.t < network.betas.length / 4 ? last.x0 : last.x);
  }
  return last.x0;
}

/** The standard deviation of pictures from their mean. */
function variety(x) {
  let sum = 0;
  for (let k = 0; k < SIZE; k++) {
    const values = Array.from({ length: NINE }, (_, i) => x[i * SIZE + k]), mean = values.reduce((a, b) => a + b) / NINE;
    sum += values.reduce((total, value) => total + (value - mean) ** 2, 0);
  }
  return Math.sqrt(sum / x.length);
}

let seed = 5; // of the emoji at the end
const strip = { at: 0, isTouched: false, shown: [] }; // shown: the pictures of each guidance

/** Show the pictures with the guidance of an index in large. */
function choose(k) {
  strip.at = k;
  $("strip-place").value = k;
  const [name, ...costs] = ["name", "work", "variety"].map((key) => $(`strip-${key}-${k}`).textContent);
  $("strip-place").ariaValueText = name;
  $("strip-now").textContent = name;
  $("strip-costs").textContent = costs.filter(Boolean).join(", ") || "being drawn";
  drawImages($("strip-none"), strip.shown[0], SHAPE, 3, 1);
  drawImages($("strip-grid"), strip.shown[k], SHAPE, 3, 1);
}

/** Show what the reader wants to see, and no longer what is being drawn. */
function pick(k) {
  strip.isTouched = true;
  choose(k);
}

/** Smileys from the same noise with each guidance. Below them, how often the network is asked, and how they vary. */
async function drawStrip() {
  const network = await included("emoji"), y = new Array(NINE).fill(network.classes.indexOf("smileys"));
  const tell = (name, share, text) => {
    $(name).style.setProperty("--share", share);
    $(name).textContent = text;
  };
  let first;
  for (const [k, w] of STRIP.entries()) {
    const x = await emerge(network, strip.shown[k], y, w, (shown) => {
      strip.shown[k] = shown;
      drawImages($(`strip-${k}`), shown, SHAPE, 3, 1);
      if (k === strip.at || !strip.isTouched) choose(k);
    });
    const questions = STEPS * (w ? 2 : 1), own = variety(x);
    first ??= own;
    tell(`strip-work-${k}`, questions / (2 * STEPS), `asked ${questions} times`);
    tell(`strip-variety-${k}`, own / first, `variety ${(100 * own / first).toFixed(0)} %`);
    choose(strip.at);
  }
}

/** Emoji of all kinds in turn, a few at the same time. */
async function drawEnding() {
  const x = noiseOf(seed++, COUNT, SIZE)();
  showEnding(x);
  $("ending-more").disabled = true;
  const network = await included("emoji");
  for (let first = 0; first < COUNT; first += AT_ONCE) {
    const from = first * SIZE, y = Array.from({ length: AT_ONCE }, (_, k) => (first + k) % network.classes.length);
    await emerge(network, x.slice(from, from + AT_ONCE * SIZE), y, 0, (shown) => {
      x.set(shown, from);
      showEnding(x);
    });
  }
  $("ending-more").disabled = false;
}

const showEnding = (x) => drawImages($("ending"), x, SHAPE, innerWidth < 800 ? 6 : 12, 2);

/** Begin when an element is seen. Returns what begins again. output: the name of the element for an error. */
function beginWhenSeen(name, draw, output) {
  let begun = false;
  const begin = () => draw().catch((error) => { $(output).textContent = error.message.split("\n")[0]; });
  follow($(name), (isSeen) => {
    if (isSeen && !begun) begin();
    begun ||= isSeen;
  }, 0.2);
  return begin;
}

/** Make both work. Before they are seen, they show noise. */
export function startEmoji() {
  const nine = noiseOf(5, NINE, SIZE)();
  for (const k of STRIP.keys()) {
    strip.shown[k] = nine;
    drawImages($(`strip-${k}`), nine, SHAPE, 3, 1);
    $(`strip-${k}`).onclick = () => pick(k);
  }
  choose(0);
  $("strip-place").oninput = ({ target }) => pick(Number(target.value));
  beginWhenSeen("strip", drawStrip, "strip-costs");
  showEnding(noiseOf(seed, COUNT, SIZE)());
  $("ending-more").onclick = beginWhenSeen("ending", drawEnding, "ending-text");
}
