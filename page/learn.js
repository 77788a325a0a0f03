// Section 2: a network learns the arrows of the points. This is Algorithm 1, watched, and its saved
// weights.

import { $, captions, follow, pause, still } from "./common.js";
import * as plane from "./plane.js";
import { STD, exactEps, missed } from "./points.js";
import { ABAR, BETAS, noiseOf, reverse, uniform } from "./sampler.js";
import { DATA } from "./scene.js";
import { Timeline } from "./timeline.js";
import { Trainer, draw, epsOf } from "./trainer.js";

const { colours } = plane;
const BATCH = 128, SAMPLES = 200, STEPS = 3000;
const LAST = 40; // the index of the last weights that are saved
const PACE = { first: 9000, next: 200 }; // milliseconds from one index to the next
const SLICE = 10; // milliseconds of work at a time, so that nothing stalls
const INDEX = 80, SIGNAL = Math.sqrt(ABAR[INDEX]), SPREAD = Math.sqrt(1 - ABAR[INDEX]); // of the arrows
const saved = []; // {steps, average, x0, misses}: x0 are samples
const trainer = new Trainer(), random = uniform(1, 0), show = captions("learn");
let timeline, example, trains = false; // example: of the first step, which is shown slowly

/** After how many steps of training the weights of an index are saved. */
const stepsAt = (i) => Math.ceil(STEPS * (i / LAST) ** 2);
const trained = () => Math.max(0, saved.length - 1) / LAST; // the place until which it is trained
const at = () => timeline.place * LAST; // between the saved weights with the indices below and above
const shown = () =>
  saved[Math.floor(at())] ?? { steps: 0, average: trainer.average, x0: new Float32Array() };
/** How much of the time of the example has passed, or 0 where it is not shown. */
const partOf = () => (at() < 1 ? at() : 0);
const mix = (a, b, share) => a.map((value, k) => value + share * (b[k] - value));

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

/** Save the weights, and what they draw, always from the same noise. */
async function save() {
  const average = trainer.average.map((p) => p.slice());
  const eps = (x, t) => epsOf(average, x, t), xT = noiseOf(0, SAMPLES, 2)();
  let last;
  for await (last of reverse(eps, xT, BETAS, 50, false)) {
    if (last.t % 5 === 4) await pause(0);
  }
  const misses = (100 * missed(last.x0, DATA, STD)).toFixed(0);
  saved.push({ steps: trainer.steps, average, x0: last.x0, misses });
  timeline.render();
}

/** Move on: slowly in the first step, and not beyond what is trained. */
function training(passed) {
  const pace = at() < 1 ? PACE.first : PACE.next;
  timeline.place = Math.min(timeline.place + passed / pace / LAST, trained());
  if (timeline.place === 1) timeline.state = "idle";
}

/** Move to a place, or as far as it is trained, and then on. */
function moveTo(place) {
  timeline.place = Math.min(place, trained());
  timeline.go(place > timeline.place ? "training" : "idle");
}

function play() {
  if (timeline.place === 1) timeline.place = 0;
  timeline.go("training");
}

function say() {
  const { steps, misses } = shown(), part = partOf(), { isMoving, place } = timeline;
  const phase = part < 0.35 ? "noise" : part < 0.65 ? "guess" : "correct";
  const share = saved.length ? `${misses}%` : "–", stage = steps < STEPS ? "some" : "done";
  $("learn-play").textContent = isMoving ? "❚❚" : "►";
  $("learn-play").ariaLabel = isMoving ? "Pause" : place === 1 ? "Play again" : "Play";
  $("learn-place").ariaValueText = `training step ${steps}`;
  $("learn-place").style.setProperty("--from", trained()); // a mark
  $("learn-misses").textContent = share;
  const said = show(part ? phase : steps ? stage : "none", { steps });
  return `${said} ${share} of the dots miss the arcs.`;
}

/** The right arrows, and over them those of the network, where there are noisy points to practise on;
 * and the points that followed them, on their way from one network that is saved to the next. */
function drawStage() {
  const view = plane.clear($("learn-plane"), 1.25), places = plane.grid(view, view.height < 300 ? 9 : 11);
  const cell = view.unit * (places[2] - places[0]), part = partOf(), now = shown();
  const isNear = (k) => Math.max(0, Math.min(1, 2 - 1.5 * Math.hypot(places[k] / 1.4, places[k + 1])));
  const alpha = (k) => (part ? 0.3 : 1) * isNear(2 * k);
  const exact = exactEps(places, ABAR[INDEX], DATA, STD), eps = epsOf(now.average, places, INDEX);
  plane.drawHaze(view, 1, 0.08);
  for (const [its, colour, width] of [[exact, colours.arrow, 5], [eps, colours.lit, 2]]) {
    plane.drawArrows(view, places, its.map((value) => -value), colour, cell, width, alpha);
  }
  const next = saved[Math.floor(at()) + 1] ?? now, x = mix(now.x0, next.x0, at() % 1);
  plane.drawDots(view, x, 2.8, colours.ink, part ? 0.12 : 0.85);
  if (part) drawExample(view, part);
}

/** A dot that is far from its origin: {x0, xt, guess}, shrunk as the data are. */
function exampleOf() {
  const { x0, noise } = draw(DATA, 0, BATCH, random);
  const isFar = (x, y) => Math.abs(Math.hypot(x, y) - 1.7) < 0.2;
  const i = noise.findIndex((x, k) => k % 2 === 0 && isFar(x, noise[k + 1]));
  const origin = x0.slice(i, i + 2).map((value) => SIGNAL * value);
  const xt = origin.map((value, k) => value + SPREAD * noise[i + k]);
  const eps = epsOf(saved[0].average, xt, INDEX);
  return { x0: origin, xt, guess: xt.map((value, k) => value - SPREAD * eps[k]) };
}

/** One thing after the other: the clean dot, its noise, the guess, and the correction. */
function drawExample(view, part) {
  const { x0, xt, guess } = (example ??= exampleOf());
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
  follow(timeline.stage, train);
  if (!still) timeline.whenSeen(play);
  timeline.render();
  return timeline;
}
