// Section 2: a network learns the arrows of the points. This is Algorithm 1, watched.

import { followData } from "./arrows.js";
import { $, Owner, animate, announce, bind, follow, pause } from "./common.js";
import { clear, colours, drawArrows, drawDots, drawLine, drawRing, grid } from "./plane.js";
import { STD, exactEps, missed } from "./points.js";
import { ABAR, BETAS, noiseOf, sampleProgressive, uniform } from "./sampler.js";
import { Trainer, draw, lossOf, noised } from "./trainer.js";

const BATCH = 128, SHOWN = 5, SAMPLES = 200; // SHOWN: points of the batch that are drawn
const SLOW = 6, PAUSE = 900, HOLD = 2000; // the first steps are slow, and each batch is shown for a while; milliseconds
const SLICE = 24, REST = 150; // milliseconds of work at a time, so that nothing stalls, and between two drawings

const state = { t: 300 };
// What begins anew with other data: the data of section 1, the last losses, the loss of the formula, and
// what is shown. {centres, trainer, random, losses, floor, batch, samples}
let lesson;
let ask, painted = 0, isSeen = false; // for a frame; when the last one was; whether the section is in sight
const training = new Owner(() => announce(render()));

/** Begin again. */
function restart(centres = lesson.centres) {
  lesson = { centres, trainer: new Trainer(), random: uniform(1, 0), losses: [] };
  render();
}

/** One step of Algorithm 1. */
function step() {
  const { centres, trainer, random, losses } = lesson;
  const batch = draw(centres, STD, BATCH, random), result = trainer.step(batch);
  if (losses.push(result.loss) > 100) losses.shift();
  if (trainer.steps <= SLOW || performance.now() > lesson.batch.until) {
    lesson.batch = { until: performance.now() + HOLD, points: examples(batch, result) };
  }
}

/** The first points of a batch whose x_t is in the view and no mere noise, each with the network's guess of its x_0. */
function examples({ x0, t }, { xt, eps }) {
  const two = (values, i) => [values[2 * i], values[2 * i + 1]];
  const guess = xt.map((value, k) => { // (15), clipped as in sampling
    const abar = ABAR[t[k >> 1]];
    return Math.min(1, Math.max(-1, (value - Math.sqrt(1 - abar) * eps[k]) / Math.sqrt(abar)));
  });
  return t.map((level, i) => ({ level, x0: two(x0, i), xt: two(xt, i), guess: two(guess, i) }))
    .filter(({ level, xt }) => level < 600 && xt.every((value) => Math.abs(value) < 2)).slice(0, SHOWN);
}

/** Take steps while running: slowly at first, then as many as fit into a slice. */
async function train(run) {
  while (!run.stopped) {
    const isSlow = lesson.trainer.steps < SLOW, end = performance.now() + SLICE;
    do step(); while (!isSlow && performance.now() < end);
    if (isSlow || performance.now() > painted + REST) ask();
    await pause(isSlow ? PAUSE : 0); // which is at least 4 ms
  }
}

/** Every two seconds, while one looks: find the floor if it is unknown, and draw samples if the network has changed. */
async function measure() {
  for (let seed = 0; ; seed++) {
    await pause(2000);
    if (document.hidden || !isSeen) continue;
    const mine = lesson; // another one may have begun before the end
    mine.floor ??= await lossOfFormula(mine);
    if (mine.trainer.steps === (mine.samples?.steps ?? 0)) continue;
    mine.samples = await sample(mine, seed);
    ask();
  }
}

/** What the closed form reaches, in the mean over fresh batches. */
async function lossOfFormula({ centres }) {
  const drawn = uniform(2, 0), batches = 40;
  let sum = 0;
  for (let k = 0; k < batches; k++) {
    const batch = draw(centres, STD, BATCH, drawn), xt = noised(batch);
    const exact = batch.t.map((t, i) => exactEps(xt.subarray(2 * i, 2 * i + 2), ABAR[t], centres, STD));
    sum += lossOf(batch.noise, exact.flatMap((eps) => [...eps]));
    await pause(0);
  }
  return sum / batches;
}

async function sample({ centres, trainer }, seed) {
  const { steps } = trainer, options = { sampler: "ddim", steps: 50 };
  let x0;
  for await (const frame of sampleProgressive(trainer.eps.bind(trainer), noiseOf(seed, SAMPLES, 2), BETAS, options)) {
    x0 = frame.x0;
    await pause(0);
  }
  return { steps, x0, misses: 100 * missed(x0, centres, STD) };
}

/** Say where the training is, and draw it soon. */
function render() {
  ask();
  return say();
}

function paint() {
  painted = performance.now();
  drawBatch(lesson);
  drawField(lesson);
  drawSamples(lesson);
  say();
}

/** A few points of a batch: from the data to x_t, and from there to the guess. */
function drawBatch({ centres, batch }) {
  const view = clear($("learn-batch"));
  drawDots(view, centres, 1.5, colours.data, 0.4);
  for (const { x0, xt, guess } of batch?.points ?? []) {
    drawLine(view, [x0, xt], colours.arrow);
    drawLine(view, [xt, guess], colours.lit);
    drawDots(view, x0, 4.5, colours.data);
    drawDots(view, xt, 4, colours.ink);
    drawRing(view, guess, 5, colours.lit);
  }
}

/** The arrows that are learnt, at the t of the slider: those that are wrong over the right ones. */
function drawField({ centres, trainer }) {
  const view = clear($("learn-field")), places = grid(view), { t } = state;
  const scaled = (x, by) => x.map((value) => by * value), exact = exactEps(places, ABAR[t], centres, STD);
  drawDots(view, scaled(centres, Math.sqrt(ABAR[t])), 1.5, colours.data, 0.5);
  drawArrows(view, places, scaled(exact, -1), colours.arrow);
  if (!trainer.steps) return;
  const eps = trainer.eps(places, t), error = eps.map((value, k) => value - exact[k]);
  const isWrong = (k) => Math.hypot(error[2 * k], error[2 * k + 1]) > 0.1; // the usual length is 1
  drawArrows(view, places, scaled(eps, -1), colours.lit, 2.5, isWrong);
}

/** The samples, over discs around the data: a sample outside of them is a miss. */
function drawSamples({ centres, samples }) {
  const view = clear($("learn-samples"), 1.3), [left] = view.at(0, 0), [right] = view.at(3 * STD, 0);
  drawDots(view, centres, right - left, colours.data, 0.3);
  if (samples) drawDots(view, samples.x0, 2.2, colours.ink);
}

function say() {
  const { trainer: { steps }, losses, samples, floor } = lesson;
  const loss = losses.reduce((a, b) => a + b, 0) / losses.length, times = (loss / floor).toFixed(2);
  $("learn-at").textContent = `level ${state.t}`;
  $("learn-start").textContent = training.busy ? "Pause" : steps ? "Continue" : "Start";
  $("learn-numbers").textContent = !steps ? "" : `The mean loss of the last steps (at most 100) is `
    + `${loss.toPrecision(3)}${floor ? `, ${times} times the floor (perfect: 1)` : ""}.`;
  const misses = samples?.misses, word = misses <= 10 ? "good" : misses <= 30 ? "fair" : "still poor";
  const judgement = samples ? ` At step ${samples.steps}, ${misses.toFixed(0)} % of its samples missed the data: ${word}.` : "";
  return $("learn-status").textContent = steps ? `Training step ${steps}.${judgement}`
    : training.busy ? "The training begins." : "Not trained yet: press Start.";
}

/** Make the section work. */
export function startLearning() {
  ask = animate($("learning"), paint);
  follow($("learning"), (value) => { isSeen = value; });
  bind(state, "learn-", render);
  followData(restart);
  $("learn-start").onclick = () => (training.busy ? training.stop() : training.start(train));
  $("learn-again").onclick = () => restart();
  measure();
}
