// Section 2: a network learns the arrows of dots, which the reader may draw. This is Algorithm 1.

import { $, captions, onChoice, onPointer, still } from "./common.js";
import * as plane from "./plane.js";
import { MISS, SHAPES, STD, exactEps, missed, nearest, posterior } from "./points.js";
import { ABAR, T, noiseOf, normal, partsAt, reverse, stateAt, uniform } from "./sampler.js";
import { Timeline } from "./timeline.js";
import { Trainer, draw, epsOf } from "./trainer.js";

const { colours } = plane;
const STEPS = 3000; // of the first training on the same dots
const EVERY = 150; // steps, samples are drawn, which takes less than a tenth of the time
const SLICE = 30; // milliseconds of training in a frame, so that nothing stalls
const NOISE = noiseOf(0, 200, 2), FEW = NOISE.subarray(0, 160); // where samples begin; FEW are shown
const LOWEST = 80, LOW = 10; // levels of the arrows: at LOW, the exact ones turn to single dots
const PHASE = 3200, WAIT = 2000, TRAVEL = 5000; // milliseconds, also before a way back and of it
const PULLS = 24, PULL = 240; // at the ring in slow motion, and the milliseconds of each
const SPACING = 0.05, MOST = 500; // of the dots that the reader draws
const random = uniform(1, 0), show = captions("learn");
let data = SHAPES.arcs, trainer = new Trainer(), goal = STEPS; // where the training stops
let samples = { eps: null, misses: "–" }; // {eps, way, exact, misses, steps, isNew} of a network
let pen = null, drawn = new Float32Array(); // where the reader draws, and what
let timeline, view, slow = null; // a training step in slow motion

/** The way back of dots along these arrows, in so many steps. */
const wayOf = (eps, steps, x = FEW) => Array.fromAsync(reverse(eps, x, T - 1, steps, false));

const isSeparate = () => data === SHAPES.many || data === SHAPES.few;

/** Let dots follow the network's arrows, and at the end also the exact ones of separate dots. */
async function sample() {
  const { steps } = trainer, average = trainer.average.map((p) => p.slice());
  const eps = (x, t) => epsOf(average, x, t), itsEps = (x, t) => exactEps(x, ABAR[t], data);
  const [count, x_T] = steps < goal ? [50] : [200, NOISE], way = await wayOf(eps, count, x_T);
  const exact = isSeparate() && steps >= STEPS && await wayOf(itsEps, count);
  const misses = data.length ? `${missed(way.at(-1).x0, data)}%` : "–";
  samples = { eps, way, exact, misses, steps, isNew: !average[4].some(Boolean) }; // see `untrained`
  timeline.render();
}

/** Train for a part of a frame. */
function training() {
  const end = performance.now() + SLICE;
  do trainer.step(draw(data));
  while (trainer.steps % EVERY && performance.now() < end);
  if (trainer.steps % EVERY) return;
  const isOver = trainer.steps >= goal, sampled = sample();
  if (isOver) timeline.stop();
  if (isOver && !still) sampled.then(() => timeline.move || timeline.place || showWay(1));
}

/** Show the way of the samples back from a place of the slider. */
function showWay(begin) {
  timeline.place = begin;
  timeline.go((passed) => {
    timeline.place = Math.max(0, timeline.place - passed / TRAVEL);
    if (!timeline.place) timeline.stop();
  });
}

function play() {
  const isOn = timeline.move;
  if (slow) return isOn ? timeline.stop() : timeline.hold(PHASE, slow.phase < 5 ? showNext : pull);
  stop(isOn ? timeline.place : 0); // where it trains
  if (isOn || !data.length) return;
  if (trainer.steps >= goal) goal *= 3;
  timeline.go(training);
}

/** Stop what goes on, at this place. A step in slow motion has moved the slider. */
function stop(place = slow ? 0 : timeline.place) {
  timeline.place = place;
  slow = null;
  timeline.stop();
}

/** Learn other dots, from what the network has learnt before. */
function learn(dots) {
  stop(0);
  data = dots;
  [trainer, goal] = [new Trainer(trainer.parameters), STEPS];
  sample();
  if (data.length) timeline.go(training);
}

/** Take a training step in slow motion, with one dot of its batch. next: what moves after it. */
function slowDown(next) {
  stop(0);
  if (!data.length) return;
  const batch = draw(data), pairOf = (values, k) => values.slice(2 * k, 2 * k + 2);
  const isSeen = (t, k) => t >= 150 && t < 300 && Math.hypot(...pairOf(batch.noise, k)) < 1.2;
  const k = batch.t.findIndex(isSeen), t = batch.t[k], [signal, spread] = partsAt(t);
  const x0 = pairOf(batch.x0, k), origin = x0.map((value) => signal * value); // of x_t
  const xt = origin.map((value, i) => value + spread * pairOf(batch.noise, k)[i]); // (4)
  const eps = epsOf(trainer.parameters, xt, t), guess = xt.map((its, i) => its - spread * eps[i]);
  const shrunk = data.map((value) => signal * value), weights = posterior(xt, ABAR[t], data);
  slow = timeline.slow = { batch, t, x0, origin, xt, guess, shrunk, weights, next, phase: 0 };
  timeline.hold(PHASE, showNext);
}

/** Show the next phase: dot (0), level, noise, prediction, correction, those of other steps. */
function showNext() {
  timeline.place = Math.sqrt((slow.t + 1) / T);
  timeline.hold(PHASE, ++slow.phase < 5 ? showNext : pull);
}

/** Let an origin of the noisy dot pull the ring, each as often as it is likely, and the k-th one
 * 1 / (k + 1) of the way: so it comes to rest at their average. */
function pull() {
  const { batch, next, weights, shrunk, origin } = slow, k = slow.pulls = (slow.pulls ?? 0) + 1;
  slow.guess = slow.guess.map((value, i) => value + (origin[i] - value) / (k + 1));
  let m = 0, left = (k * 0.618) % 1; // evenly spread over the probabilities
  while (left > weights[m] && m < weights.length - 1) left -= weights[m++];
  slow.origin = shrunk.slice(2 * m, 2 * m + 2);
  if (k < PULLS) return timeline.hold(PULL, pull);
  stop();
  trainer.step(batch);
  sample();
  timeline.go(next);
}

/** Add dots on the way of the pointer, at the beginning one. */
function addDots(event) {
  const end = view.place(event), start = pen ?? end;
  const length = Math.hypot(end[0] - start[0], end[1] - start[1]);
  const count = pen ? Math.floor(length / SPACING) : 1;
  if (!count) return;
  const dots = Array.from({ length: count }, (_, k) => end.map((value, i) =>
    start[i] + ((value - start[i]) * (k + 1)) / count + STD * normal(random)));
  data = Float32Array.from([...data, ...dots.flat()]).slice(-2 * MOST);
  pen = end;
  timeline.render();
}

function say() {
  const { steps, misses, isNew = true } = samples, { place } = timeline;
  $("learn-play").textContent = timeline.move ? "❚❚" : "►";
  $("learn-play").ariaLabel = timeline.move ? "Pause" : steps < goal ? "Train" : "Train longer";
  const what = isSeparate() ? "are new, not at a dot of the data" : "miss the blue glow";
  const isKnown = !slow && misses !== "–" && (steps >= goal || !isSeparate());
  $("learn-misses").textContent = isKnown ? `${misses} ${what}` : "–";
  $("learn-exact").style.visibility = samples.exact && !slow ? "visible" : "hidden";
  const markStep = (item, k) => { item.ariaCurrent = slow?.phase === k ? "step" : null; };
  $("learn-shapes").lastChild.textContent = data === drawn && data.length ? "Clear" : "Draw";
  [...$("learn-steps").children].forEach(markStep);
  const last = !isSeparate() ? "done" : data === SHAPES.many ? "many" : "few";
  const stage = isNew ? "none" : !steps ? "again" : steps < goal ? "some" : last;
  const atPlace = place && timeline.move !== training ? "level" : stage;
  const key = slow ? `slow${slow.phase}` : data.length ? atPlace : "empty";
  return `${show(key, { steps, misses })} ${misses} of the dots ${what}.`;
}

/** The data, with the arrows and the samples at the level of the slider. */
function drawStage() {
  const level = T * timeline.place ** 2 - 1, [signal] = partsAt(level);
  view = plane.clear($("learn-plane"), 1.25);
  const shrunk = data.map((value) => signal * value);
  for (const share of [1, 0.8, 0.6, 0.4]) { // a dot misses them outside this glow
    plane.drawDots(view, shrunk, share * MISS * signal * view.unit, colours.data, 0.14);
  }
  if (slow) return drawStep(slow);
  if (pen || !samples.eps || !data.length) return;
  if (level > 0 || !samples.exact) { // they would cover the separate dots
    drawArrows(Math.max(samples.exact ? LOW : LOWEST, Math.round(level)), shrunk);
  }
  if (data === SHAPES.many) plane.drawRing(view, [0, 0], 0.95 * signal * view.unit, colours.dim, 1);
  if (samples.exact) plane.drawDots(view, stateAt(samples.exact, level).x, 5, colours.dim);
  plane.drawDots(view, stateAt(samples.way, level).x.subarray(0, FEW.length), 4, colours.other, 0.9);
}

/** The phases of a step in slow motion until now. */
function drawStep({ phase, x0, origin, xt, guess, shrunk, weights }) {
  const small = Math.min(1, view.height / 400);
  if (phase > 4) plane.drawOrigins(view, xt, shrunk, weights, small);
  else if (phase > 1) plane.drawLines(view, [[origin, xt]], colours.dim, 3 * small);
  if (phase > 1) plane.drawDots(view, xt, 7 * small, colours.ink);
  plane.drawDots(view, phase ? origin : x0, 7 * small, colours.data);
  if (phase > 2) plane.drawArrow(view, xt, guess, colours.lit, 3 * small, { gap: 12 * small });
  if (phase > 2) plane.drawRing(view, guess, 10 * small, colours.lit, 3.5 * small);
  if (phase > 3) plane.drawArrow(view, guess, origin, colours.data, 3 * small, { gap: 12 * small });
}

/** The exact arrows, and over them those of the network. They fade where noise of this level hardly
 * ever moves a dot. shrunk: the data at this level. */
function drawArrows(level, shrunk) {
  const places = plane.grid(view, view.height < 300 ? 9 : 11), [, spread] = partsAt(level);
  const alphas = Array.from({ length: places.length / 2 }, (_, k) =>
    2 - nearest(places[2 * k], places[2 * k + 1], shrunk).distance / 2 / spread);
  const fields = [[exactEps(places, ABAR[level], data), colours.arrow, 5],
    [samples.eps(places, level), colours.lit, 2]];
  for (const [eps, colour, width] of fields) {
    plane.drawField(view, places, eps, colour, width, alphas);
  }
}

/** Make the section work. Returns its timeline. */
export function startLearning() {
  const takeOver = () => timeline.move === training || stop(timeline.place); // the training goes on
  const comeBack = () => showWay(still ? 0 : timeline.place);
  const letGo = () => timeline.move || timeline.hold(WAIT, comeBack);
  timeline = new Timeline("learn", { draw: drawStage, say, takeOver, letGo });
  onChoice("learn-shapes", (shape) => // pressed again, Draw clears the drawing
    learn(SHAPES[shape] ?? (data === drawn ? new Float32Array() : drawn)));
  onPointer($("learn-plane"), {
    press(event) {
      if (data !== drawn) return; // only after Draw
      stop(0); // where the dots are drawn
      addDots(event);
    },
    drag: (event) => pen && addDots(event),
    release() {
      if (pen) learn(drawn = data);
      pen = null;
    },
  });
  $("learn-play").onclick = play;
  $("learn-step").onclick = () => {
    timeline.stage.scrollIntoView({ block: "nearest" });
    slowDown(slow ? slow.next : timeline.move && training); // which goes on, if it was on
  };
  if (!still) timeline.hold(0, () => slowDown(training), 0.7);
  sample();
  return timeline;
}
