// What the second network draws by itself when it is seen: smileys with guidance, and the emoji at the end.

import { $, Owner, follow, pause } from "./common.js";
import { shown as imagesShown } from "./images.js";
import { included } from "./networks.js";
import { drawFilm, drawImages, frame, partOf, pictureAt } from "./plane.js";
import { alphasBar, guided as withGuidance, noiseOf, predictX0, sampleProgressive } from "./sampler.js";

const STEPS = 10, SHAPE = [3, 32, 32], SIZE = 3072;
const STRIP = [0, 0.5, 1, 2, 4], NINE = 9; // the guidance of the strip, and its pictures at each
const ASKED = 3; // the step whose two answers are shown in large
const COUNT = 36, AT_ONCE = 12, KINDS = ["smileys", "people", "flags", "food"], GUIDANCE = 1; // of the emoji at the end
const FRAME = 250; // milliseconds of a step when one is shown again

/** What is shown of a step: x_t, and at the end the estimates. */
const seen = ({ t, x, x0 }) => (t < 250 ? x0 : x);

/** Draw pictures of the classes y from xT with guidance w, and show(x, steps) after each step. Returns the steps,
 * and at the end the result. */
async function emerge(network, xT, y, w, show) {
  const steps = [], options = { sampler: "sa-solver", steps: STEPS, xT };
  for await (const step of sampleProgressive(withGuidance(network, y, w), null, network.betas, options)) {
    steps.push(step);
    await show(seen(step), steps);
  }
  const { x0 } = steps.at(-1);
  steps.push({ t: -1, x: x0, x0 }); // the result
  return steps;
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

const strip = { at: 2, chosen: 1, noise: null, answers: null }; // answers: [x0 without the word, x0 with it]

/** Show the two answers about a picture, and what the guidance of an index makes of them. */
function choose(k, chosen = strip.chosen) {
  Object.assign(strip, { at: k, chosen });
  const [name, ...costs] = ["name", "work", "variety"].map((key) => $(`strip-${key}-${k}`).textContent), w = STRIP[k];
  [$("strip-place").value, $("strip-place").ariaValueText, $("strip-now").textContent] = [k, name, name];
  $("strip-costs").textContent = costs.filter(Boolean).join(", ") || "being drawn";
  $("strip-added").innerHTML = w ? `Used: <b>${w === 0.5 ? "½" : w} × farther</b> in the same direction` : "Used: the guess with the word";
  for (const i of STRIP.keys()) $(`strip-${i}`).closest("figure").classList.toggle("on", i === k);
  frame($("strip"), chosen, 3, 3);
  $("strip-without").classList.toggle("old", !w); // this is not asked
  if (!strip.answers) return;
  const [without, expected] = strip.answers.map((all) => partOf(all, chosen, NINE));
  const guided = expected.map((value, i) => value + w * (value - without[i]));
  Object.entries({ without, with: expected, guided }).forEach(([key, shown]) => drawImages($(`strip-${key}`), shown, SHAPE));
}

/** Smileys from the same noise with each guidance. Below them, how often the network is asked, and how they vary. */
async function drawStrip() {
  const network = await included("emoji"), y = new Array(NINE).fill(network.classes.indexOf("smileys"));
  const tell = (name, share, text) => {
    $(name).style.setProperty("--share", share);
    $(name).textContent = text;
  };
  const waiting = [0, 4, 1, 3, 2]; // the indices: after the first one, next is what the reader wants to see
  let first;
  while (waiting.length) {
    const [k] = waiting.splice(first ? Math.max(0, waiting.indexOf(strip.at)) : 0, 1), w = STRIP[k];
    const steps = await emerge(network, strip.noise, y, w, async (shown, { length, [ASKED]: asked }) => {
      drawImages($(`strip-${k}`), shown, SHAPE, 3, 1);
      if (k === strip.at) $("strip-costs").textContent = `step ${length} of ${STEPS}`;
      if (!asked || strip.answers) return;
      const { t, x, x0 } = asked;
      strip.answers = [predictX0(x, await network.eps(x, t), alphasBar(network.betas)[t], 1), x0];
      choose(strip.at);
    });
    const questions = STEPS * (w ? 2 : 1), own = variety(steps.at(-1).x0);
    first ??= own;
    tell(`strip-work-${k}`, questions / (2 * STEPS), `${questions} runs of the network`);
    tell(`strip-variety-${k}`, own / first, `variety ${(100 * own / first).toFixed(0)}%`);
    choose(strip.at);
  }
}

// ---- the end

let seed = 5;
const end = { chosen: 4, rows: [] }; // rows: the steps of those that were drawn at the same time
const replay = new Owner();
const grid = () => (innerWidth < 800 ? [6, 6] : [12, 3]); // its columns and rows
const showEnding = (x) => drawImages($("ending"), x, SHAPE, grid()[0], 2);

/** Draw emoji of some kinds in turn, a row at the same time. */
async function drawEnding() {
  const x = noiseOf(seed++, COUNT, SIZE)();
  replay.stop();
  end.chosen %= AT_ONCE;
  [end.rows, $("ending-more").disabled] = [[], true];
  showEnding(x);
  const network = await included("emoji"), kinds = KINDS.map((kind) => network.classes.indexOf(kind));
  for (let from = 0; from < COUNT; from += AT_ONCE) {
    const y = Array.from({ length: AT_ONCE }, (_, k) => kinds[(from + k) % kinds.length]);
    const xT = x.slice(from * SIZE, (from + AT_ONCE) * SIZE);
    end.rows.push(await emerge(network, xT, y, GUIDANCE, (shown, steps) => {
      x.set(shown, from * SIZE);
      showEnding(x);
      if (!from) showStep(end.chosen, steps, steps.length);
      $("ending-more").textContent = `Row ${1 + from / AT_ONCE}, step ${steps.length} of ${STEPS}`;
    }));
    if (!from) showStep(end.chosen, end.rows[0], STEPS + 1);
  }
  [$("ending-more").disabled, $("ending-more").textContent] = [false, "Draw 36 others"];
}

/** Show the way of an emoji until a step, and frame it. */
function showStep(k, steps, count) {
  end.chosen = k;
  frame($("ending-wall"), k, ...grid());
  drawImages($("ending-one"), partOf(seen(steps[count - 1]), k % AT_ONCE, AT_ONCE), SHAPE);
  drawFilm($("ending-film"), steps.slice(0, count), { k: k % AT_ONCE, count: AT_ONCE, shape: SHAPE, total: STEPS + 1 });
}

/** Show the way of an emoji once more. */
async function showAgain(k, run) {
  const steps = end.rows[Math.floor(k / AT_ONCE)];
  for (let count = 1; count <= steps?.length; count++) {
    if (run.stopped) return;
    showStep(k, steps, count);
    await pause(FRAME);
  }
}

/** Say an error of draw() in the element `output`. */
const tried = (draw, output) => () => draw().catch((error) => { $(output).textContent = error.message.split("\n")[0]; });

/** The function that calls another one only once. */
function once(call) {
  let begun = false;
  return () => {
    if (!begun) call();
    begun = true;
  };
}

/** Make both work. Before they are seen, they show noise. */
export function startEmoji() {
  strip.noise = noiseOf(5, NINE, SIZE)();
  for (const k of STRIP.keys()) {
    drawImages($(`strip-${k}`), strip.noise, SHAPE, 3, 1);
    $(`strip-${k}`).onclick = (event) => choose(k, pictureAt(event, event.target, 3, 3));
  }
  choose(strip.at);
  $("strip-place").oninput = ({ target }) => choose(Number(target.value));
  const begin = once(tried(drawStrip, "strip-costs"));
  imagesShown.then(begin); // so that the reader need not wait
  follow($("guidance"), (isSeen) => isSeen && begin(), 0.2);
  showEnding(noiseOf(seed, COUNT, SIZE)());
  frame($("ending-wall"), end.chosen, ...grid());
  $("ending").onpointerdown = $("ending").onpointermove = (event) => {
    const k = pictureAt(event, event.target, ...grid());
    if (k !== end.chosen || event.type === "pointerdown") replay.start((run) => showAgain(k, run));
  };
  $("ending-more").onclick = tried(drawEnding, "ending-text");
  const beginEnding = once($("ending-more").onclick);
  follow($("ending"), (isSeen) => isSeen && beginEnding(), 0.6);
}
