// Section 2: a network learns the arrows of the points. This is Algorithm 1, watched, and its saved weights.

import { $, animate, announce, follow, pause, still } from "./common.js";
import { clear, colours, drawArrows, drawDots, drawHaze, drawLine, drawRing, grid } from "./plane.js";
import { STD, density, exactEps, missed } from "./points.js";
import { ABAR, BETAS, noiseOf, reverse, uniform } from "./sampler.js";
import { DATA } from "./scene.js";
import { Trainer, draw, epsOf } from "./trainer.js";

const BATCH = 128, SAMPLES = 200, STEPS = 3000, LAST = 40; // LAST: the index of the last weights that are saved
const CARDS = [0, 1, 10]; // the weights whose guess is shown slowly, with an example
const LEVEL = 80, LIMIT = 1.25; // the noise level of the arrows, and the view
const PACE = { card: 2200, next: 200 }; // milliseconds
const SLICE = 10; // milliseconds of work at a time, so that nothing stalls
const SIGNAL = Math.sqrt(ABAR[LEVEL]);
/** After how many steps of training the weights of an index are saved. */
const stepsAt = (i) => Math.ceil(STEPS * (i / LAST) ** 2);

// What is seen is the weights with the index `at`, and the reader wants to see those with the index `goal`.
const state = { at: 0, goal: 0, playing: false, isSeen: false, trains: false };
export const saved = []; // {steps, average, x0, misses, card}: x0 are samples, and card is an example
const trainer = new Trainer(), random = uniform(1, 0);
let ask;

const isWanted = () => state.isSeen && saved.length <= LAST && (state.playing || state.goal > saved.length - 1);

/** Train as far as somebody wants to see. */
async function train() {
  state.trains = true;
  while (isWanted()) {
    const end = performance.now() + SLICE, next = stepsAt(saved.length);
    while (trainer.steps < next && performance.now() < end) trainer.step(draw(DATA, STD, BATCH, random));
    if (trainer.steps === next) await save();
    await pause(0);
  }
  state.trains = false;
}

/** Save the weights, with an example of their guesses, and what they draw from always the same noise. */
async function save() {
  const average = trainer.average.map((p) => p.slice()), eps = (x, t) => epsOf(average, x, t);
  const options = { sampler: "ddim", steps: 50, clip: false };
  let last;
  for await (last of reverse(eps, noiseOf(0, SAMPLES, 2), BETAS, options)) {
    if (last.t % 5 === 4) await pause(0);
  }
  saved.push({ steps: trainer.steps, average, x0: last.x0, misses: 100 * missed(last.x0, DATA, STD), card: cardOf(eps) });
  if (!state.playing) state.at = Math.min(state.goal, saved.length - 1);
  changed();
}

/** An example that is far from its origin, at the level of the arrows: {x0, xt, guess}, shrunk as the data are. */
function cardOf(eps) {
  const { x0, noise } = draw(DATA, 0, BATCH, random), spread = Math.sqrt(1 - ABAR[LEVEL]);
  const i = noise.findIndex((value, k) => k % 2 === 0 && Math.abs(Math.hypot(value, noise[k + 1]) - 1.7) < 0.2);
  const origin = x0.slice(i, i + 2).map((value) => SIGNAL * value), xt = origin.map((value, k) => value + spread * noise[i + k]);
  return { x0: origin, xt, guess: xt.map((value, k) => value - spread * eps(xt, LEVEL)[k]) };
}

/** Move on while playing: slowly through the first cards, and not beyond what is trained. */
function advance(passed) {
  const pace = CARDS.includes(Math.floor(state.at)) ? PACE.card : PACE.next, next = Math.min(state.at + passed / pace, saved.length - 1);
  if (next <= state.at) return false;
  state.at = next;
  if (state.at >= LAST) state.playing = false;
  changed();
  if (!state.playing) announce(say());
  return true;
}

/** Train if it is wanted, and show the state. */
function changed() {
  if (isWanted() && !state.trains) train();
  $("learn-place").value = state.at;
  $("learn-place").style.setProperty("--from", (saved.length - 1) / LAST); // a mark: until here, it is trained
  say();
  ask();
}

// ---- what is seen

/** The example that is shown slowly, after the weights of its index. */
const card = () => state.at % 1 > 0 && CARDS.includes(Math.floor(state.at)) ? saved[Math.floor(state.at)]?.card : null;
const shown = () => saved[Math.floor(state.at)] ?? { steps: 0, average: trainer.average, x0: new Float32Array() };

function say() {
  const now = shown(), isCard = card() !== null;
  const play = ["►", state.at >= LAST ? "Play again" : "Play"];
  [$("learn-play").textContent, $("learn-play").ariaLabel] = state.playing ? ["❚❚", "Pause"] : play;
  $("learn-place").ariaValueText = `training step ${now.steps}`;
  $("learn-misses").textContent = now.misses === undefined ? "–" : `${now.misses.toFixed(0)}%`;
  const [title, words] = isCard ? [`Training step ${now.steps + 1}`, "Noise moves a clean dot (blue) to a random place (red). The network sees only the red dot, and guesses where it came from (ring). Then it is corrected a little."]
    : !now.steps ? ["Not trained", "The network knows nothing yet. Its arrows all point to the middle: orange means wrong, and the dots that follow them do not find the arcs."]
    : state.goal > state.at && !state.playing ? [`Training step ${now.steps} …`, "The network has not learnt so much yet: one moment."]
    : now.steps < STEPS ? [`Training step ${now.steps}`, "An arrow turns from orange to grey as the network gets it right. The dots begin as noise, and follow the arrows."]
    : ["Trained", `After ${STEPS} steps, the arrows of the network are almost the right ones, and most of the dots that follow them end on the arcs.`];
  [$("learn-title").textContent, $("learn-text").textContent] = [title, words];
  return `${title}. ${words} ${$("learn-misses").textContent} of the dots miss the arcs.`;
}

const field = {}; // {places, exact, presence}: the right arrows, and how many noisy points lie there

/** The arrows that are learnt, coloured by their error, where there are noisy points to practise on; and the
 * points that followed them, on their way from one network that is saved to the next. */
function drawStage(now) {
  const view = clear($("learn-plane"), LIMIT), rows = view.height < 300 ? 9 : 11;
  if (field.wide !== view.wide) {
    const places = grid(view, rows), exact = exactEps(places, ABAR[LEVEL], DATA, STD);
    const q = density(rows, ABAR[LEVEL], DATA, STD, view.wide, LIMIT), largest = Math.max(...q);
    Object.assign(field, { wide: view.wide, places, exact, presence: q.map((value) => Math.min(1, 2 * Math.sqrt(value / largest))) });
  }
  const { places, exact, presence } = field, cell = (1.2 * view.height) / rows;
  drawHaze(view, 1, DATA, 1.5 * STD);
  const eps = epsOf(now.average, places, LEVEL), next = saved[saved.indexOf(now) + 1] ?? now, part = state.at % 1;
  const error = (k) => Math.hypot(eps[2 * k] - exact[2 * k], eps[2 * k + 1] - exact[2 * k + 1]);
  const ways = eps.map((value) => -value), wrong = (k) => presence[k] * Math.min(1, 1.5 * error(k));
  drawArrows(view, places, ways, colours.arrow, cell, { width: 2, alpha: (k) => presence[k] });
  drawArrows(view, places, ways, colours.lit, cell, { width: 2.5, alpha: wrong });
  drawDots(view, now.x0.map((value, k) => value + part * (next.x0[k] - value)), 2.8, colours.ink, card() ? 0.12 : 0.85);
  if (card()) drawCard(view, card(), part);
}

/** An example, one thing after the other: the data point, its noise, the guess. part: of the time, 0 to 1. */
function drawCard(view, { x0, xt, guess }, part) {
  const until = (from, to) => Math.min(1, Math.max(0, (part - from) / (to - from)));
  const way = (a, b, share) => [a, a.map((value, k) => value + share * (b[k] - value))];
  drawLine(view, way(x0, xt, until(0.12, 0.4)), colours.dim, 2.5);
  drawDots(view, x0, 8, colours.page);
  drawDots(view, x0, 6.5, colours.data);
  drawDots(view, way(x0, xt, until(0.12, 0.4))[1], 6.5, colours.other);
  if (part < 0.5) return;
  drawLine(view, way(xt, guess, until(0.5, 0.7)), colours.lit, 3);
  if (part > 0.7) drawRing(view, guess, 9, colours.lit, 3);
}

/** The share of points that miss, after each step that is saved. */
function drawCurve() {
  const { context, width, height } = clear($("learn-curve"), 1);
  const place = (i) => [4 + (i / LAST) * (width - 8), height - 4 - (saved[i].misses / 100) * (height - 8)];
  [context.strokeStyle, context.lineWidth] = [colours.lit, 2.5];
  context.beginPath();
  saved.forEach((_, i) => context.lineTo(...place(i)));
  context.stroke();
  context.fillStyle = colours.ink;
  context.beginPath();
  context.arc(...place(Math.floor(state.at)), 4, 0, 2 * Math.PI);
  context.fill();
}

/** Make the section work. */
export function startLearning() {
  ask = animate($("learn-stage"), (passed) => {
    if (state.playing && saved.length && !advance(passed)) return true;
    drawStage(shown());
    if (saved.length) drawCurve();
    return state.playing;
  });
  let begun = still;
  const play = (playing) => {
    begun = true;
    if (playing && state.at >= LAST) state.at = 0;
    Object.assign(state, { playing, goal: state.at });
    changed();
  };
  $("learn-place").max = LAST;
  $("learn-place").oninput = ({ target }) => {
    const goal = Number(target.value);
    Object.assign(state, { goal, at: Math.min(goal, Math.max(0, saved.length - 1)), playing: false });
    begun = true;
    changed();
  };
  $("learn-play").onclick = () => play(!state.playing);
  follow($("learn-stage"), (isSeen) => {
    state.isSeen = isSeen;
    changed();
  });
  follow($("learn-stage"), (isSeen) => isSeen && !begun && play(true), 0.5);
}
