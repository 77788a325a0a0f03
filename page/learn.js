// Section 2: a network learns the arrows of the points. This is Algorithm 1, watched, and its saved
// weights.

import { $, captions, follow, pause, still } from "./common.js";
import * as plane from "./plane.js";
import { STD, exactEps, missed, posterior } from "./points.js";
import { ABAR, BETAS, noiseOf, reverse, uniform } from "./sampler.js";
import { DATA } from "./scene.js";
import { Timeline } from "./timeline.js";
import { Trainer, draw, epsOf } from "./trainer.js";

const { colours } = plane;
const BATCH = 128, SAMPLES = 200, STEPS = 3000;
const LAST = 40; // the index of the last weights that are saved
const CARDS = [0, 1, 10]; // the weights whose guess is shown slowly, with an example
const PACE = { first: 9000, card: 3500, next: 200 }; // milliseconds
const SLICE = 10; // milliseconds of work at a time, so that nothing stalls
const INDEX = 80, SIGNAL = Math.sqrt(ABAR[INDEX]), SPREAD = Math.sqrt(1 - ABAR[INDEX]); // of the arrows
/** After how many steps of training the weights of an index are saved. */
const stepsAt = (i) => Math.ceil(STEPS * (i / LAST) ** 2);

const saved = []; // {steps, average, x0, misses, card}: x0 are samples, and card is an example
const trainer = new Trainer(), random = uniform(1, 0), show = captions("learn");
let timeline, trains = false;
let goal = null; // the place that the reader wants to see, if it is not trained yet

const trained = () => Math.max(0, saved.length - 1) / LAST; // the place until which it is trained
const at = () => timeline.place * LAST; // between the saved weights with the indices below and above
const shown = () =>
  saved[Math.floor(at())] ?? { steps: 0, average: trainer.average, x0: new Float32Array() };
/** The example that is shown slowly, after the weights of its index. */
const card = () => (at() % 1 && CARDS.includes(Math.floor(at())) ? shown().card : null);

/** Train while the section is seen. */
async function train() {
  if (trains) return;
  trains = true;
  while (timeline.seen && saved.length <= LAST) {
    const end = performance.now() + SLICE, next = stepsAt(saved.length);
    while (trainer.steps < next && performance.now() < end) {
      trainer.step(draw(DATA, STD, BATCH, random));
    }
    if (trainer.steps === next) await save();
    await pause(0);
  }
  trains = false;
}

/** Save the weights, with an example of their guesses, and what they draw from always the same noise. */
async function save() {
  const average = trainer.average.map((p) => p.slice()), eps = (x, t) => epsOf(average, x, t);
  const options = { sampler: "ddim", steps: 50, clip: false };
  let last;
  for await (last of reverse(eps, noiseOf(0, SAMPLES, 2)(), BETAS, options)) {
    if (last.t % 5 === 4) await pause(0);
  }
  const misses = (100 * missed(last.x0, DATA, STD)).toFixed(0);
  saved.push({ steps: trainer.steps, average, x0: last.x0, misses, card: cardOf(eps) });
  timeline.render();
}

/** An example that is far from its origin, at the level of the arrows: {x0, xt, guess}, shrunk as the
 * data are. */
function cardOf(eps) {
  const { x0, noise } = draw(DATA, 0, BATCH, random);
  const isFar = (x, y) => Math.abs(Math.hypot(x, y) - 1.7) < 0.2;
  const i = noise.findIndex((x, k) => k % 2 === 0 && isFar(x, noise[k + 1]));
  const origin = x0.slice(i, i + 2).map((value) => SIGNAL * value);
  const xt = origin.map((value, k) => value + SPREAD * noise[i + k]), its = eps(xt, INDEX);
  return { x0: origin, xt, guess: xt.map((value, k) => value - SPREAD * its[k]) };
}

/** Move on: slowly through the first cards, and not beyond what is trained. */
function training(passed) {
  const index = Math.floor(at()), isSlow = goal === null && CARDS.includes(index);
  const pace = isSlow ? (index ? PACE.card : PACE.first) : PACE.next, end = goal ?? 1;
  timeline.place = Math.min(timeline.place + passed / pace / LAST, trained(), end);
  if (timeline.place === end) timeline.state = "idle";
}

function moveTo(place) {
  timeline.place = Math.min(place, trained());
  goal = place > timeline.place ? place : null;
  timeline.go(goal === null ? "idle" : "training");
}

function play() {
  goal = null;
  if (timeline.place === 1) timeline.place = 0;
  timeline.go("training");
}

// ---- what is seen

function say() {
  const { steps, misses } = shown(), part = at() % 1, { isMoving, place } = timeline;
  const phase = part < 0.35 ? "noise" : part < 0.65 ? "guess" : "correct";
  const share = saved.length ? `${misses}%` : "–", stage = steps < STEPS ? "some" : "done";
  $("learn-play").textContent = isMoving ? "❚❚" : "►";
  $("learn-play").ariaLabel = isMoving ? "Pause" : place === 1 ? "Play again" : "Play";
  $("learn-place").ariaValueText = `training step ${steps}`;
  $("learn-place").style.setProperty("--from", trained()); // a mark
  $("learn-misses").textContent = share;
  const said = show(card() ? phase : steps ? stage : "none", { steps, next: steps + 1 });
  return `${said} ${share} of the dots miss the arcs.`;
}

let field = {}; // {width, places, exact, presence}: the right arrows, and how many noisy points lie there

function fieldOf(view) {
  if (field.width === view.width) return field;
  const places = plane.grid(view, view.height < 300 ? 9 : 11), abar = ABAR[INDEX];
  const q = Array.from({ length: places.length / 2 }, (_, k) =>
    posterior(places[2 * k], places[2 * k + 1], abar, DATA, STD).density);
  const largest = Math.max(...q), presence = q.map((value) => Math.min(1, 2 * Math.sqrt(value / largest)));
  field = { width: view.width, places, presence, exact: exactEps(places, abar, DATA, STD) };
  return field;
}

/** The right arrows, and over them those of the network, where there are noisy points to practise on;
 * and the points that followed them, on their way from one network that is saved to the next. */
function drawStage() {
  const view = plane.clear($("learn-plane"), 1.25), { places, presence, exact } = fieldOf(view);
  const cell = view.unit * (places[2] - places[0]), its = card(), now = shown();
  const eps = epsOf(now.average, places, INDEX), alpha = (k) => (its ? 0.3 : 1) * presence[k];
  plane.drawHaze(view, 1, 0.08);
  for (const [its, colour, width] of [[exact, colours.arrow, 5], [eps, colours.lit, 2]]) {
    plane.drawArrows(view, places, its.map((value) => -value), colour, cell, width, alpha);
  }
  const next = saved[Math.floor(at()) + 1] ?? now, x = mix(now.x0, next.x0, at() % 1);
  plane.drawDots(view, x, 2.8, colours.ink, its ? 0.12 : 0.85);
  if (its) drawCard(view, its, at() % 1);
}

const mix = (a, b, share) => a.map((value, k) => value + share * (b[k] - value));

/** An example, one thing after the other: the data point, its noise, the guess, and the correction.
 * part: of the time, 0 to 1. */
function drawCard(view, { x0, xt, guess }, part) {
  const until = (from, to) => Math.min(1, Math.max(0, (part - from) / (to - from)));
  const noisy = mix(x0, xt, until(0.1, 0.3)), ring = mix(guess, x0, 0.3 * until(0.8, 0.95));
  plane.drawLine(view, [x0, noisy], colours.dim, 2.5);
  plane.drawDots(view, x0, 7, colours.data);
  if (part > 0.35) plane.drawLine(view, [xt, mix(xt, guess, until(0.35, 0.5))], colours.lit, 3);
  plane.drawDots(view, noisy, 7, colours.ink);
  if (part > 0.65) plane.drawArrow(view, guess, mix(guess, x0, until(0.65, 0.8)), colours.data, 3, 12);
  if (part > 0.5) plane.drawRing(view, ring, 10, colours.lit, 3.5);
}

/** Make the section work. Returns its timeline. */
export function startLearning() {
  timeline = Object.assign(new Timeline("learn", drawStage, say), { training, moveTo });
  $("learn-play").onclick = () => (timeline.isMoving ? timeline.stop() : play());
  follow(timeline.stage, () => train());
  if (!still) timeline.whenSeen(play);
  timeline.render();
  return timeline;
}
