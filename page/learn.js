// Section 2: a network learns the arrows of the points. This is Algorithm 1, watched.

import { followPlane, useLearnt } from "./arrows.js";
import { $, Owner, bind, breathe, inSight, pause } from "./common.js";
import { clear, colours, drawArrows, drawDots, drawLine, drawRing, grid } from "./plane.js";
import { STD, exactEps, judged } from "./points.js";
import { ABAR, BETAS, T, noiseOf, sampleProgressive, uniform } from "./sampler.js";
import { Trainer, WEIGHTS, draw, noised } from "./trainer.js";

const BATCH = 128, SHOWN = 5, SAMPLES = 200; // SHOWN: points of the batch that one sees
const SLOW = 6, PAUSE = 900, HOLD = 2000; // the first steps are slow, and each batch is shown for a while; milliseconds
const SLICE = 12; // milliseconds of work at a time, so that nothing on the page stalls
const WRONG = 0.1; // an arrow is wrong if it is off by more than this (an arrow's usual length is 1)

const state = { target: "v", weights: "simple", width: 64, rate: 0.012, data: "all", t: 30, average: true };
let cloud, plane; // the data of section 1, and its state: the sampler and the steps
let centres; // those of the data that are trained on
let trainer, random, show;
let example; // some points of an earlier batch: {until, points: [{t, x0, xt, eps}]}
let losses, floor; // floor: the loss of the closed form
let samples; // {x0, off}: off, how many of a hundred miss the data
let dirty, stale; // whether the drawings, and the samples, are older than the network
const training = new Owner(), measuring = new Owner();

/** The noise that the network expects at x. */
const eps = (x, t) => trainer.eps(x, new Array(x.length / 2).fill(t), null,
  state.average ? trainer.average : trainer.parameters);

/** Begin again, with the settings of the controls. */
function restart() {
  const n = cloud.length / 2, taken = state.data === "all" ? n : Math.min(Number(state.data), n);
  const index = Array.from({ length: taken }, (_, k) => Math.floor((k * n) / taken)); // evenly over the data
  centres = Float32Array.from(index.flatMap((k) => [cloud[2 * k], cloud[2 * k + 1]]));
  random = uniform(1, 0);
  trainer = new Trainer(state);
  [losses, floor, example, samples, stale] = [[], null, null, null, false];
  useLearnt(null);
  measuring.start(findFloor);
  render();
}

/** The squared difference of point i of one array from point k of another. */
const squared = (a, b, i, k = i) => ((a[2 * i] - b[2 * k]) ** 2 + (a[2 * i + 1] - b[2 * k + 1]) ** 2) / 2;

/** What the closed form reaches, in the mean over fresh batches. */
async function findFloor(run) {
  const drawn = uniform(2, 0), batches = 40;
  let loss = 0;
  for (let k = 0; k < batches; k++) {
    const fresh = draw(centres, STD, null, BATCH, drawn), xt = noised(fresh);
    fresh.t.forEach((level, i) => {
      const exact = exactEps(xt.subarray(2 * i, 2 * i + 2), ABAR[level], centres, STD);
      loss += WEIGHTS[trainer.weights](level) * squared(fresh.noise, exact, i, 0);
    });
    await pause(0);
    if (run.stopped) return;
  }
  floor = loss / (batches * BATCH);
  dirty = true;
}

/** One step of Algorithm 1. */
function step() {
  const batch = draw(centres, STD, null, BATCH, random), result = trainer.step(batch);
  losses.push(result.loss);
  if (!(example?.until > performance.now()) || trainer.steps <= SLOW) example = exampleOf(batch, result);
  [dirty, stale] = [true, true];
}

/** The first points of the batch whose x_t is within the view, to be drawn. */
function exampleOf({ x0, t }, { xt, eps }) {
  const two = (values, i) => [values[2 * i], values[2 * i + 1]];
  const seen = t.map((_, i) => i).filter((i) => two(xt, i).every((value) => Math.abs(value) < 2)).slice(0, SHOWN);
  const points = seen.map((i) => ({ t: t[i], x0: two(x0, i), xt: two(xt, i), eps: two(eps, i) }));
  return { until: performance.now() + HOLD, points };
}

/** Take steps while running: slowly at first, then as many as fit into a slice. */
async function train(run) {
  while (!run.stopped) {
    const isSlow = trainer.steps < SLOW, end = performance.now() + SLICE;
    do step(); while (!isSlow && performance.now() < end);
    await (isSlow ? pause(PAUSE) : breathe());
  }
}

/** Draw samples of the network anew every two seconds, if it has changed. */
async function sampleLoop() {
  for (let seed = 0; ; seed++) {
    await pause(2000);
    if (!stale || !trainer.steps) continue;
    stale = false;
    const mine = trainer, { sampler } = plane, steps = Math.min(200, plane.steps);
    let x0, end = performance.now() + SLICE;
    for await (const frame of sampleProgressive(eps, noiseOf(seed, SAMPLES, 2), BETAS, { sampler, steps })) {
      x0 = frame.x0;
      if (performance.now() < end) continue;
      await breathe();
      if (mine !== trainer) break;
      end = performance.now() + SLICE;
    }
    if (mine !== trainer) continue;
    samples = { x0, off: (100 * judged(x0, centres, STD).off) / SAMPLES };
    dirty = true;
    useLearnt(eps);
  }
}

// ---- the drawings

/** A few points of the batch: x_0 shrunk, the noise from it to x_t, and the predicted noise back. */
function drawBatch() {
  const view = clear($("learn-batch")), { context, at, width } = view;
  drawDots(view, centres, 1.5, colours.data, 0.4);
  context.font = "13px system-ui, sans-serif";
  const labels = []; // their places, so that none covers another
  for (const { t, x0, xt, eps: noise } of example?.points ?? []) {
    const from = x0.map((value) => Math.sqrt(ABAR[t]) * value);
    const guess = xt.map((value, c) => value - Math.sqrt(1 - ABAR[t]) * noise[c]);
    drawLine(view, [from, xt], colours.arrow);
    drawLine(view, [xt, guess], colours.lit);
    drawLine(view, [guess, from], colours.other, 2.5, [4, 5]);
    drawDots(view, from, 4.5, colours.data);
    drawDots(view, xt, 4, colours.ink);
    drawDots(view, guess, 3, colours.lit);
    let [x, y] = at(...xt);
    [x, y] = [Math.min(x + 7, width - 52), Math.max(y - 6, 14)];
    while (labels.some(([left, top]) => Math.abs(left - x) < 56 && Math.abs(top - y) < 15)) y += 3;
    labels.push([x, y]);
    context.fillStyle = colours.ink;
    context.fillText(`t = ${t}`, x, y);
  }
}

/** The arrows that are learnt, at the t of the slider: those that are wrong over the right ones. */
function drawField() {
  const view = clear($("learn-field")), places = grid(view), { t } = state;
  const minus = (x) => x.map((value) => -value), exact = exactEps(places, ABAR[t], centres, STD);
  drawDots(view, centres.map((value) => Math.sqrt(ABAR[t]) * value), 1.5, colours.data, 0.5);
  drawArrows(view, places, minus(exact), colours.arrow);
  if (!trainer.steps) return;
  const guess = eps(places, t);
  drawArrows(view, places, minus(guess), colours.lit, 2.5, (k) => 2 * squared(guess, exact, k) > WRONG ** 2);
}

function drawSamples() {
  const view = clear($("learn-samples"), 1.3), few = centres.length < 100;
  if (!few) drawDots(view, centres, 3, colours.data, 0.45);
  if (samples) drawDots(view, samples.x0, 2.6, colours.ink);
  for (let k = 0; few && k < centres.length; k += 2) { // rings, to tell copies
    drawRing(view, centres.subarray(k, k + 2), (3 * STD * view.height) / 2.6, colours.data);
  }
}

/** The loss against the steps, with a logarithmic scale, and its floor. */
function drawLoss() {
  const view = clear($("learn-loss")), { context, width, height } = view, left = 44, bottom = 24, n = losses.length;
  const length = Math.max(1, Math.ceil(n / 150)), means = [];
  for (let k = 0; k + length <= n; k += length) {
    means.push([(k + length / 2) / Math.max(n, 100), losses.slice(k, k + length).reduce((a, b) => a + b) / length]);
  }
  const low = (floor ?? 0.1) / 2, high = 1.2 * Math.max(1, ...means.map(([, y]) => y));
  const place = ([x, y]) => [left + x * (width - left - 8), (height - bottom) * (1 - Math.log(y / low) / Math.log(high / low))];
  context.font = "13px system-ui, sans-serif";
  for (const tick of [0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10].filter((y) => y > low && y < high)) {
    const [, y] = place([0, tick]);
    context.fillStyle = colours.dim;
    context.fillText(tick, 2, y + 5);
    context.fillStyle = colours.line;
    context.fillRect(left, y, width - left, 1);
  }
  const last = `step ${n}`;
  context.fillStyle = colours.dim;
  context.fillText("0", left, height - 6);
  context.fillText(last, width - context.measureText(last).width - 4, height - 6);
  const screen = { context, at: (...point) => point };
  drawLine(screen, means.filter(([, y]) => y > low).map(place), colours.lit);
  if (floor) drawLine(screen, [[0, floor], [1, floor]].map(place), colours.dim, 2, [6, 6]);
}

const DRAWINGS = { batch: drawBatch, field: drawField, samples: drawSamples, loss: drawLoss };

/** Draw what has changed and is in sight, some times a second, and say where the training is. */
function paint() {
  if (dirty) {
    dirty = false;
    for (const [name, drawIt] of Object.entries(DRAWINGS)) {
      if (inSight($(`learn-${name}`))) drawIt();
      else dirty = true; // it may come into sight
    }
    say();
  }
  setTimeout(() => requestAnimationFrame(paint), 150);
}

function say() {
  const recent = losses.slice(-100), mean = recent.reduce((a, b) => a + b, 0) / recent.length;
  $("learn-start").textContent = training.busy ? "Pause" : losses.length ? "Continue" : "Start";
  $("learn-status").textContent = !losses.length ? "Not trained yet: press Start, or take one step."
    : `Step ${trainer.steps.toLocaleString("en")}. ` + (!samples ? "" : `${samples.off.toFixed(0)} % of its samples miss the data: `
      + `${samples.off <= 10 ? "good" : samples.off <= 30 ? "fair" : "poor"} (the formula: about 3 % in 50 steps).`);
  $("learn-numbers").textContent = !losses.length ? ""
    : `The mean loss of the last ${recent.length} ${recent.length > 1 ? "batches" : "batch"} is ${mean.toPrecision(3)}`
      + (floor ? `, ${(mean / floor).toFixed(2)} times the floor (perfect: 1).` : ".");
}

/** Show the state in the controls and in words, and draw it soon. */
function render() {
  show();
  $("learn-at").textContent = `t = ${state.t}`;
  dirty = true;
  say();
}

/** Make the section work. */
export function startLearning() {
  show = bind(state, "learn-", (key) => {
    if (["target", "weights", "width", "rate", "data"].includes(key)) return restart();
    if (key !== "t") stale = true;
    render();
  });
  training.changed = say;
  followPlane((points, planeState) => {
    plane = planeState;
    stale = true;
    if (points === cloud) return;
    cloud = points;
    restart();
  });
  $("learn-start").onclick = () => (training.busy ? training.stop() : training.start(train));
  $("learn-step").onclick = () => training.busy || step();
  $("learn-again").onclick = restart;
  sampleLoop();
  paint();
}
