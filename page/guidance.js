// Section 4: smileys from the same noise, with more and more guidance.

import { $, follow, onTurn } from "./common.js";
import { shown as imagesShown } from "./images.js";
import { included } from "./networks.js";
import { drawImages, frame, partOf, pictureAt } from "./plane.js";
import { alphasBar, guided, noiseOf, predictX0, sampleProgressive } from "./sampler.js";

const STEPS = 10, SHAPE = [3, 32, 32], SIZE = 3072;
const STRIP = [0, 1, 2, 4], NINE = 9; // the guidance of each set, and its pictures
const ASKED = 4; // the step whose two answers are shown in large
const state = { at: 1, chosen: 1, noise: null, answers: null, begun: false }; // answers: [x0 without the word, x0 with it]

/** The standard deviation of pictures from their mean. */
function variety(x) {
  let sum = 0;
  for (let k = 0; k < SIZE; k++) {
    const values = Array.from({ length: NINE }, (_, i) => x[i * SIZE + k]), mean = values.reduce((a, b) => a + b) / NINE;
    sum += values.reduce((total, value) => total + (value - mean) ** 2, 0);
  }
  return Math.sqrt(sum / x.length);
}

/** Show the two answers about a picture, and what the guidance of set k makes of them. */
function choose(k, chosen = state.chosen) {
  Object.assign(state, { at: k, chosen: (chosen + NINE) % NINE });
  const [name, ...costs] = ["name", "work", "variety"].map((key) => $(`strip-${key}-${k}`).textContent), w = STRIP[k];
  [$("strip-place").value, $("strip-place").ariaValueText, $("strip-now").textContent] = [k, name, name];
  $("strip-costs").textContent = costs.filter(Boolean).join(", ") || "being drawn";
  $("strip-added").innerHTML = w ? `Used: <b>${w} × farther</b> in the same direction` : "Used: the guess with the word";
  for (const i of STRIP.keys()) $(`strip-${i}`).closest("figure").classList.toggle("on", i === k);
  frame($("strip"), state.chosen, 3, 3);
  $("strip-without").classList.toggle("old", !w); // this is not asked
  if (!state.answers) return;
  const [without, expected] = state.answers.map((all) => partOf(all, state.chosen, NINE));
  const beyond = expected.map((value, i) => value + w * (value - without[i]));
  Object.entries({ without, with: expected, guided: beyond }).forEach(([key, shown]) => drawImages($(`strip-${key}`), shown, SHAPE));
}

/** Draw a set, and ask at one step of the first one for both answers. Returns the pictures. */
async function drawSet(k, network) {
  const y = new Array(NINE).fill(network.classes.indexOf("smileys"));
  const options = { sampler: "sa-solver", steps: STEPS, xT: state.noise };
  let count = 0, last;
  for await (const { t, x, x0 } of sampleProgressive(guided(network, y, STRIP[k]), null, network.betas, options)) {
    drawImages($(`strip-${k}`), t < 250 ? x0 : x, SHAPE, 3, 1);
    last = x0;
    if (++count === ASKED && !state.answers) {
      state.answers = [predictX0(x, await network.eps(x, t), alphasBar(network.betas)[t], 1), x0];
      choose(state.at);
    }
    if (k === state.at) $("strip-costs").textContent = `step ${count} of ${STEPS}`;
  }
  return last;
}

/** Draw all sets. Below each, how often the network was asked, and how much its pictures vary. */
async function drawStrip() {
  const network = await included("emoji"), waiting = [0, 3, 1, 2]; // after the first one, next is what the reader wants to see
  const tell = (name, share, text) => {
    $(name).style.setProperty("--share", share);
    $(name).textContent = text;
  };
  let first;
  while (waiting.length) {
    const [k] = waiting.splice(first ? Math.max(0, waiting.indexOf(state.at)) : 0, 1);
    const own = variety(await drawSet(k, network)), questions = STEPS * (k ? 2 : 1);
    first ??= own;
    tell(`strip-work-${k}`, questions / (2 * STEPS), `${questions} runs of the network`);
    tell(`strip-variety-${k}`, own / first, `variety ${((100 * own) / first).toFixed(0)}%`);
    choose(state.at);
  }
}

/** Draw all, once. */
function begin() {
  if (!state.begun) drawStrip().catch((error) => { $("strip-costs").textContent = error.message.split("\n")[0]; });
  state.begun = true;
}

/** Make the section work. Before it is drawn, it shows noise. */
export function startGuidance() {
  state.noise = noiseOf(5, NINE, SIZE)();
  for (const k of STRIP.keys()) {
    drawImages($(`strip-${k}`), state.noise, SHAPE, 3, 1);
    $(`strip-${k}`).onclick = (event) => choose(k, pictureAt(event, event.target, 3, 3));
  }
  choose(state.at);
  $("strip-place").oninput = ({ target }) => choose(Number(target.value));
  onTurn($("strip-place"), (turn) => choose(state.at, state.chosen + turn));
  imagesShown.then(begin); // so that the reader need not wait
  follow($("guidance"), (isSeen) => isSeen && begin(), 0.2);
}
