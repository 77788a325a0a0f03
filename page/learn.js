// Section 2: a network learns the arrows of the points. This is Algorithm 1, watched.

import { $, captions, pause, still } from "./common.js";
import * as plane from "./plane.js";
import { DATA, MISS, STD, exactEps, missed } from "./points.js";
import { ABAR, BETAS, noiseOf, partsAt, reverse, uniform } from "./sampler.js";
import { Timeline } from "./timeline.js";
import { Trainer, draw, epsOf } from "./trainer.js";

const { colours } = plane;
const BATCH = 128, SAMPLES = 64, STEPS = 3000;
const LAST = 20; // the index of the last weights that are saved, which takes a tenth of the time
const INDEX = 80; // of the level of the arrows
const PACE = { first: 9000, next: 400 }; // milliseconds from one index to the next
const SLICE = 10; // milliseconds of work at a time, so that nothing stalls
const saved = []; // {steps, average, x0, misses}: x0 are samples
const trainer = new Trainer(), random = uniform(1, 0), show = captions("learn");
let timeline, trains = false, exact = []; // exact: eps at the places of the arrows

/** After how many steps of training the weights of an index are saved. */
const stepsAt = (i) => Math.ceil(STEPS * (i / LAST) ** 2);
const trained = () => Math.max(0, saved.length - 1) / LAST; // the place until which it is trained
const at = () => timeline.place * LAST; // between the indices of two saved weights
const shown = () =>
  saved[Math.floor(at())] ?? { steps: 0, average: trainer.average, x0: new Float32Array() };
/** The first index shows one example of a training step: how much of it, or 0 before and after. */
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
  const average = trainer.average.map((p) => p.slice()), xT = noiseOf(0, SAMPLES, 2);
  let last;
  for await (last of reverse((x, t) => epsOf(average, x, t), xT, BETAS, 50, false)) {
    if (last.t % 5 === 4) await pause(0);
  }
  const { x0 } = last, misses = `${missed(x0, DATA)}%`;
  saved.push({ steps: trainer.steps, average, x0, misses });
  timeline.render();
}

/** Move on: slowly in the first step, and not beyond what is trained. */
function training(passed) {
  const pace = at() < 1 ? PACE.first : PACE.next;
  timeline.place = Math.min(timeline.place + passed / pace / LAST, trained());
  if (timeline.place === 1) timeline.state = "idle";
}

/** Move to a place, or as far as it is trained. */
function moveTo(place) {
  timeline.place = Math.min(place, trained());
  timeline.render();
}

function play() {
  if (timeline.place === 1) timeline.place = 0;
  timeline.go("training");
}

function say() {
  const { steps, misses = "–" } = shown(), part = partOf(), { state, place } = timeline;
  const phase = part < 0.35 ? "noise" : part < 0.65 ? "guess" : "correct";
  $("learn-play").textContent = state !== "idle" ? "❚❚" : "►";
  $("learn-play").ariaLabel = state !== "idle" ? "Pause" : place === 1 ? "Play again" : "Play";
  $("learn-place").ariaValueText = `training step ${steps}`;
  $("learn-place").style.setProperty("--from", trained()); // a mark
  $("learn-misses").textContent = misses;
  const stage = !steps ? "none" : steps < STEPS ? "some" : "done";
  return `${show(part ? phase : stage, { steps })} ${misses} of the dots miss the arcs.`;
}

/** The true arrows, and over them those of the network, where there are noisy points to practise
 * on; and the points that followed them, on their way to those of the next network. */
function drawStage() {
  const view = plane.clear($("learn-plane"), 1.25), part = partOf(), now = shown();
  const rows = view.height < 300 ? 9 : 11, cell = view.height / rows;
  const places = plane.grid(view, rows);
  const far = (k) => Math.hypot(places[2 * k] / 1.4, places[2 * k + 1]); // from the arcs
  const alpha = (k) => (part ? 0.3 : 1) * Math.max(0, Math.min(1, 2 - 1.5 * far(k)));
  if (exact.length !== places.length) exact = exactEps(places, ABAR[INDEX], DATA, STD);
  const eps = epsOf(now.average, places, INDEX);
  for (const share of [1, 0.8, 0.6, 0.4]) { // the arcs, beyond which a dot misses them
    plane.drawDots(view, DATA, share * MISS * view.unit, colours.data, 0.14);
  }
  for (const [its, colour, width] of [[exact, colours.arrow, 5], [eps, colours.lit, 2]]) {
    plane.drawArrows(view, places, its.map((value) => -value), colour, cell, width, alpha);
  }
  const next = saved[Math.floor(at()) + 1] ?? now;
  plane.drawDots(view, mix(now.x0, next.x0, at() % 1), 2.8, colours.other, part ? 0.15 : 0.9);
  if (part) drawExample(view, part);
}

/** A clean dot, its noise, the guess of the first network, and the correction, one by one. */
function drawExample(view, part) {
  const until = (from, to) => Math.min(1, Math.max(0, (part - from) / (to - from)));
  const [signal, spread] = partsAt(INDEX), x0 = DATA.slice(0, 2).map((value) => signal * value);
  const xt = x0.map((value, k) => value + spread * [1.2, -1.2][k]);
  const eps = epsOf(saved[0].average, xt, INDEX);
  const guess = xt.map((value, k) => value - spread * eps[k]);
  const noisy = mix(x0, xt, until(0.1, 0.3)), ring = mix(guess, x0, 0.3 * until(0.8, 0.95));
  plane.drawLine(view, [x0, noisy], colours.dim, 2.5);
  plane.drawDots(view, noisy, 7, colours.ink);
  plane.drawDots(view, x0, 7, colours.data);
  const end = mix(guess, x0, until(0.65, 0.8)); // of the arrow that corrects
  if (part > 0.65) plane.drawArrow(view, guess, end, colours.data, 3, 12);
  if (part > 0.4) plane.drawRing(view, ring, 10, colours.lit, 3.5);
}

/** Make the section work. Returns its timeline. */
export function startLearning() {
  const its = { training, moveTo, whenSeen: train };
  timeline = Object.assign(new Timeline("learn", drawStage, say), its);
  $("learn-play").onclick = () => (timeline.state === "idle" ? play() : timeline.stop());
  if (!still) timeline.hold(0, play, 0.7);
  timeline.render();
  return timeline;
}
