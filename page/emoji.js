// What the second network draws by itself when it is seen: smileys with guidance, and the emoji at the end.

import { $, Owner, follow, pause } from "./common.js";
import { included } from "./networks.js";
import { drawImages } from "./plane.js";
import { alphasBar, guided, noiseOf, predictX0, sampleProgressive } from "./sampler.js";

const STEPS = 10, SHAPE = [3, 32, 32], SIZE = 3072;
const STRIP = [0, 0.5, 1, 2, 4], NINE = 9; // the guidance of the strip, and its pictures at each
const ASKED = 3; // the step whose two answers are shown in large
const COUNT = 36, FIRST = 6, FRAME = 110; // emoji at the end, which is large first, and the milliseconds of a step when one is shown again

/** What is shown of a step: x_t, and at the end the estimates. */
const seen = ({ t, x, x0 }) => (t < 250 ? x0 : x);
const part = (x, k) => x.subarray(k * SIZE, (k + 1) * SIZE);

/** Draw pictures of the classes y from xT with guidance w, and show(x) each step. Returns the steps. */
async function emerge(network, xT, y, w, show) {
  const steps = [], options = { sampler: "sa-solver", steps: STEPS, xT };
  for await (const step of sampleProgressive(guided(network, y, w), null, network.betas, options)) {
    steps.push(step);
    show(seen(step));
  }
  return steps;
}

/** The picture that a pointer is at, in a canvas of rows of `columns`. */
function pictureAt({ offsetX, offsetY, target }, columns) {
  const side = target.clientWidth / columns;
  return Math.floor(offsetX / side) + columns * Math.floor(offsetY / side);
}

// ---- guidance

/** The standard deviation of pictures from their mean. */
function variety(x) {
  let sum = 0;
  for (let k = 0; k < SIZE; k++) {
    const values = Array.from({ length: NINE }, (_, i) => x[i * SIZE + k]), mean = values.reduce((a, b) => a + b) / NINE;
    sum += values.reduce((total, value) => total + (value - mean) ** 2, 0);
  }
  return Math.sqrt(sum / x.length);
}

const strip = { at: 0, chosen: 1, isTouched: false, answers: null }; // answers: [x_t, x0 without the word, x0 with it]

/** Show the two answers about a picture, and what the guidance of an index makes of them. */
function choose(k, chosen = strip.chosen) {
  Object.assign(strip, { at: k, chosen });
  const [name, ...costs] = ["name", "work", "variety"].map((key) => $(`strip-${key}-${k}`).textContent), w = STRIP[k];
  [$("strip-place").value, $("strip-place").ariaValueText, $("strip-now").textContent] = [k, name, name];
  $("strip-costs").textContent = costs.filter(Boolean).join(", ") || "being drawn";
  $("strip-added").textContent = w ? `The difference is added ${w === 0.5 ? "½" : w} more time${w > 1 ? "s" : ""}` : "No guidance: this answer is taken";
  for (const i of STRIP.keys()) $(`strip-${i}`).parentElement.classList.toggle("on", i === k);
  $("strip-without").classList.toggle("old", !w); // nobody asks
  if (!strip.answers) return;
  const [x, without, expected] = strip.answers.map((all) => part(all, chosen));
  const exaggerated = expected.map((value, i) => value + w * (value - without[i]));
  Object.entries({ noisy: x, without, with: expected, guided: exaggerated }).forEach(([key, shown]) => drawImages($(`strip-${key}`), shown, SHAPE));
}

/** Show what the reader wants to see, and no longer what is being drawn. */
function pick(k, chosen) {
  strip.isTouched = true;
  choose(k, chosen);
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
    if (!strip.isTouched) choose(k);
    const steps = await emerge(network, nine(), y, w, (shown) => drawImages($(`strip-${k}`), shown, SHAPE, 3, 1));
    if (!strip.answers) {
      const { t, x, x0 } = steps[ASKED];
      strip.answers = [x, predictX0(x, await network.eps(x, t), alphasBar(network.betas)[t], 1), x0];
    }
    const questions = STEPS * (w ? 2 : 1), own = variety(steps.at(-1).x0);
    first ??= own;
    tell(`strip-work-${k}`, questions / (2 * STEPS), `asked ${questions} times`);
    tell(`strip-variety-${k}`, own / first, `variety ${(100 * own / first).toFixed(0)} %`);
    choose(strip.at);
  }
}

const nine = () => noiseOf(5, NINE, SIZE)();

// ---- the end

let seed = 5, steps = [], chosen = FIRST; // steps: of the emoji that are shown
const replay = new Owner();
const columns = () => (innerWidth < 800 ? 6 : 9);
const showEnding = (x) => drawImages($("ending"), x, SHAPE, columns(), 2);

/** Emoji of all kinds in turn. */
async function drawEnding() {
  const x = noiseOf(seed++, COUNT, SIZE)();
  replay.stop();
  [steps, $("ending-more").disabled] = [[], true];
  showEnding(x);
  const network = await included("emoji"), y = Array.from({ length: COUNT }, (_, k) => k % network.classes.length);
  steps = await emerge(network, x, y, 0, (shown) => {
    showEnding(shown);
    drawImages($("ending-one"), part(shown, FIRST), SHAPE);
  });
  $("ending-more").disabled = false;
}

/** Show the way of an emoji once more. */
async function showAgain(k, run) {
  chosen = k;
  for (const step of steps) {
    if (run.stopped) return;
    drawImages($("ending-one"), part(seen(step), k), SHAPE);
    await pause(FRAME);
  }
}

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
  for (const k of STRIP.keys()) {
    drawImages($(`strip-${k}`), nine(), SHAPE, 3, 1);
    $(`strip-${k}`).onclick = (event) => pick(k, pictureAt(event, 3));
  }
  choose(0);
  $("strip-place").oninput = ({ target }) => pick(Number(target.value));
  beginWhenSeen("guidance", drawStrip, "strip-costs");
  showEnding(noiseOf(seed, COUNT, SIZE)());
  $("ending").onpointerdown = $("ending").onpointermove = (event) => {
    const k = pictureAt(event, columns());
    if (k !== chosen) replay.start((run) => showAgain(k, run));
  };
  $("ending-more").onclick = beginWhenSeen("ending", drawEnding, "ending-text");
}
