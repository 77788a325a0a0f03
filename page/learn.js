// The section of the page in which a network learns the noise of the points: Algorithm 1, watched.

import { $, STD, clearPlane, drawDots, drawField, exactEps, followData, judged, scheme, useNetwork } from "./points.js";
import { ABAR, BETAS, T, noiseOf, sampleProgressive, uniform } from "./sampler.js";
import { Trainer, WEIGHTS, draw, noised } from "./trainer.js";

const BATCH = 128, SHOWN = 5, BINS = 20, SAMPLES = 200; // SHOWN: points of the batch that one sees
const SLOW = 6, PAUSE = 900, HOLD = 2000; // the first steps are slow, and each batch is shown for a while; milliseconds
const SLICE = 10; // milliseconds of work at a time, so that nothing on the page stalls

const HINTS = { // what to look for, by control and value
  target: {
    eps: "The network returns the noise itself, the paper's choice.",
    x0: "The network returns the point x₀. At small t, a small error in the point means a large error in the noise: watch the left end of the error curve.",
    v: "The network returns a mixture of the noise and the point, v = √ᾱ ε − √(1 − ᾱ) x₀: nearly the noise at small t, and nearly −x₀ at large t.",
  },
  weights: {
    simple: "All t count equally (14).",
    vlb: "The weights of the bound (12): small t count most. Move the slider of the field to large t.",
    "min-snr": "Small t, where the signal is much stronger than the noise, count less.",
  },
  width: {
    16: "A narrow network has fewer parameters: are its samples as sharp after the same number of steps?",
    64: "", 128: "With a wide network, each step takes longer: is the loss closer to the floor after the same number of steps?",
  },
  rate: {
    "0.0005": "A low learning rate: the training takes more steps to get as far.", "0.008": "",
    "0.05": "A high learning rate: the loss jumps, and averaging the weights helps most.",
  },
  data: {
    10: "Ten points: samples from the formula are copies of them. Does the network draw copies, or points between them?",
    30: "Thirty points: does the network draw copies, or points between them?", all: "",
  },
  average: { true: "", false: "The samples come from the latest weights, which change more from step to step than their average." },
};

let cloud, centres, labels; // the data of the plane; those of them that are trained on, and their classes
let trainer, random;
let example = null; // some points of an earlier batch: {until, points: [{t, x0, xt, eps}]}
let losses = [], errors, counts, floor; // errors: for each bin of t; floor: {loss, errors}, of the closed form
let running = false, training = false, dirty = true, stale = false, samples = null, generation = 0; // stale: the samples are

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const eps = (x, t, y) => trainer.eps(x, t, y, $("learn-average").checked ? trainer.average : trainer.parameters);
const levels = (x, t) => new Array(x.length / 2).fill(t);

/** Begin again, with the settings of the controls. */
async function restart() {
  const count = $("learn-data").value, mine = ++generation;
  const taken = count === "all" ? cloud.length / 2 : Math.min(Number(count), cloud.length / 2);
  const stride = cloud.length / 2 / taken; // evenly over the data
  const index = Array.from({ length: taken }, (_, k) => Math.floor(k * stride));
  centres = Float32Array.from(index.flatMap((k) => [cloud[2 * k], cloud[2 * k + 1]]));
  labels = cloud.labels ? index.map((k) => cloud.labels[k]) : null;
  random = uniform(1, 0);
  trainer = new Trainer({
    width: Number($("learn-width").value), rate: Number($("learn-rate").value),
    target: $("learn-target").value, weights: $("learn-weights").value, classes: labels ? 2 : 0,
  });
  [losses, errors, counts, floor, example, samples] = [[], new Array(BINS).fill(0), new Array(BINS).fill(0), null, null, null];
  $("learn-guidance").parentElement.hidden = !labels;
  stale = false;
  showHints();
  dirty = true;
  await findFloor(mine);
}

/** The mean squared difference of point i of one array from point k of another. */
const squared = (a, b, i, k = i) => ((a[2 * i] - b[2 * k]) ** 2 + (a[2 * i + 1] - b[2 * k + 1]) ** 2) / 2;

/** The data of a class; all of them without one. */
const ofClass = (y) => (y === 0 || y === 1 ? centres.filter((_, k) => labels[k >> 1] === y) : centres);

/** What the closed form reaches, in the mean over fresh batches. */
async function findFloor(mine) {
  const drawn = uniform(2, 0), sums = Array.from({ length: BINS }, () => [0, 0]);
  let loss = 0;
  for (let k = 1; k <= 40; k++) {
    const fresh = draw(centres, STD, labels, BATCH, drawn), { t, noise, y } = fresh, xt = noised(fresh);
    t.forEach((level, i) => {
      const exact = exactEps(xt.subarray(2 * i, 2 * i + 2), ABAR[level], ofClass(y?.[i]), STD);
      const error = squared(noise, exact, i, 0);
      loss += WEIGHTS[trainer.weights](level) * error;
      const bin = sums[Math.floor((level * BINS) / T)];
      bin[0] += error;
      bin[1]++;
    });
    await pause(0);
    if (mine !== generation) return;
  }
  floor = { loss: loss / (40 * BATCH), errors: sums.map(([sum, n]) => sum / n) };
  dirty = true;
}

/** One step of Algorithm 1. */
function step() {
  const batch = draw(centres, STD, labels, BATCH, random), result = trainer.step(batch);
  losses.push(result.loss);
  batch.t.forEach((level, i) => {
    const error = squared(batch.noise, result.eps, i);
    const bin = Math.floor((level * BINS) / T);
    counts[bin]++; // the mean of the first hundred, then a running one
    errors[bin] += Math.max(0.01, 1 / counts[bin]) * (error - errors[bin]);
  });
  if (!(example?.until > performance.now()) || trainer.steps <= SLOW) showExample(batch, result);
  [dirty, stale] = [true, true];
}

/** Keep the first points of the batch whose x_t is within the view, to be drawn. */
function showExample({ x0, t }, { xt, eps }) {
  const two = (values, i) => [values[2 * i], values[2 * i + 1]];
  const seen = t.map((_, i) => i).filter((i) => two(xt, i).every((value) => Math.abs(value) < 2));
  const points = seen.slice(0, SHOWN).map((i) => ({
    t: t[i], x0: two(x0, i), xt: two(xt, i), eps: two(eps, i),
  }));
  example = { until: performance.now() + HOLD, points };
}

/** Take steps while running: slowly at first, then as many as fit into a slice. */
async function train() {
  if (training) return; // a loop that waits goes on by itself
  training = true;
  while (running) {
    if (trainer.steps < SLOW) {
      step();
      await pause(PAUSE);
      continue;
    }
    const end = performance.now() + SLICE;
    while (performance.now() < end) step();
    await pause(0);
  }
  training = false;
}

/** Draw samples of the network anew each second, if it has changed. */
async function sampleLoop() {
  for (let seed = 0; ; seed++) {
    await pause(1000);
    if (!stale || !trainer.steps) continue;
    stale = false;
    const mine = generation, sampler = $("plane-sampler").value, steps = Math.min(200, Number($("plane-steps").value));
    const y = labels && Array.from({ length: SAMPLES }, (_, k) => k % 2), w = labels ? Number($("learn-guidance").value) : 0;
    const model = (x, t) => {
      const given = eps(x, levels(x, t), y);
      if (!w) return given;
      const free = eps(x, levels(x, t));
      return given.map((value, k) => (1 + w) * value - w * free[k]);
    };
    let x0, end = performance.now() + SLICE;
    for await (const frame of sampleProgressive(model, noiseOf(seed, SAMPLES, 2), BETAS, { sampler, steps })) {
      x0 = frame.x0;
      if (performance.now() > end) {
        await pause(0);
        end = performance.now() + SLICE;
      }
    }
    const how = `${$("plane-sampler").selectedOptions[0].text}, ${steps} step${steps > 1 ? "s" : ""}`;
    if (mine === generation) samples = { x0, y, how };
    dirty = true;
    if ($("learn-use").checked) useNetwork((x, t) => eps(x, levels(x, t)));
  }
}

// -------------------------------------------------------------------------------------- the drawings

const colours = (dark) => ({
  data: dark ? "#8ab0ff" : "#2156c9", ink: dark ? "#f1f3f5" : "#1d2026", exact: dark ? "#868e96" : "#adb5bd",
  learnt: "#d9480f", error: "#9c36b5", classes: ["#0b7285", "#c2255c"],
});

/** A few points of the batch: x_0 shrunk, the noise from it to x_t, and the predicted noise back. */
function drawBatch() {
  const plane = clearPlane($("learn-batch")), { context, dark, at, dot, size } = plane, colour = colours(dark);
  drawDots(plane, centres, 0.004, colour.data, 0.3);
  if (!example) return;
  const line = (from, to, width) => {
    context.lineWidth = width;
    context.beginPath();
    context.moveTo(...at(...from));
    context.lineTo(...at(...to));
    context.stroke();
  };
  context.font = `${0.032 * size}px sans-serif`;
  for (const { t, x0, xt, eps: noise } of example.points) {
    const from = x0.map((value) => Math.sqrt(ABAR[t]) * value), to = xt;
    const guess = xt.map((value, c) => value - Math.sqrt(1 - ABAR[t]) * noise[c]);
    context.strokeStyle = colour.exact;
    line(from, to, 2);
    context.strokeStyle = colour.learnt;
    line(to, guess, 2);
    context.setLineDash([5, 4]);
    context.strokeStyle = colour.error;
    line(guess, from, 3);
    context.setLineDash([]);
    for (const [place, fill, radius] of [[from, colour.data, 0.013], [to, colour.ink, 0.011], [guess, colour.learnt, 0.009]]) {
      context.fillStyle = fill;
      dot(...place, radius);
      context.fill();
    }
    context.fillStyle = colour.ink;
    const [x, y] = at(...to);
    context.fillText(`t = ${t}`, Math.min(x + 8, size - 0.16 * size), Math.max(y - 6, 0.04 * size));
  }
}

/** The learnt field over the exact one, at the t of the slider. */
function drawFields() {
  const plane = clearPlane($("learn-field")), t = Number($("learn-t").value), colour = colours(plane.dark);
  drawDots(plane, centres.map((value) => Math.sqrt(ABAR[t]) * value), 0.004, colour.data, 0.3);
  drawField(plane, (x) => exactEps(x, ABAR[t], centres, STD), colour.exact);
  if (trainer.steps) drawField(plane, (x) => eps(x, levels(x, t)), colour.learnt);
  $("learn-at").textContent = `t = ${t}`;
}

function drawSamples() {
  const plane = clearPlane($("learn-samples"), 1.3), colour = colours(plane.dark);
  const few = centres.length < 100; // shown above the samples, to tell copies
  if (!few) drawDots(plane, centres, 0.006, colour.data, 0.5);
  for (const k of samples ? (labels ? [0, 1] : [0]) : []) {
    const own = samples.x0.filter((_, i) => !labels || samples.y[i >> 1] === k);
    drawDots(plane, own, 0.006, labels ? colour.classes[k] : colour.ink);
  }
  for (let k = 0; few && k < centres.length; k += 2) {
    plane.context.strokeStyle = colour.data;
    plane.context.lineWidth = 3;
    plane.dot(centres[k], centres[k + 1], (3 * STD) / 2.6);
    plane.context.stroke();
  }
}

/** Curves in a canvas with logarithmic y. curves: [{points: [[x, y]], colour, dashed}], x in 0..1. */
function drawCurves(canvas, curves, low, high, ticks, labelsX) {
  const { width, height } = canvas, { context, dark } = clearPlane(canvas);
  const [left, bottom] = [64, 40], ink = colours(dark).ink;
  const place = ([x, y]) => [left + x * (width - left - 12),
    (height - bottom) * (1 - Math.log(Math.min(high, Math.max(low, y)) / low) / Math.log(high / low))];
  context.font = "22px sans-serif";
  for (const tick of ticks) {
    const [, y] = place([0, tick]);
    context.fillStyle = ink;
    context.fillText(tick, 4, y + 8);
    context.fillStyle = dark ? "#343a40" : "#e9ecef";
    context.fillRect(left, y, width - left, 1.5);
  }
  context.fillStyle = ink;
  labelsX.forEach(([x, text]) => context.fillText(text, Math.min(place([x, 1])[0], width - 11 * text.length - 14), height - 10));
  for (const { points, colour, dashed } of curves) {
    context.strokeStyle = colour;
    context.lineWidth = 3;
    context.setLineDash(dashed ? [10, 8] : []);
    context.beginPath();
    points.forEach((point) => context.lineTo(...place(point)));
    context.stroke();
    context.setLineDash([]);
  }
}

function drawLoss() {
  const colour = colours(scheme.matches), n = losses.length;
  const length = Math.max(1, Math.ceil(n / 150)), points = [];
  for (let k = 0; k + length <= n; k += length) {
    points.push([(k + length / 2) / Math.max(n, 100), losses.slice(k, k + length).reduce((a, b) => a + b) / length]);
  }
  if (points.length === 1) points.push([points[0][0] + 0.01, points[0][1]]);
  const curves = [{ points, colour: colour.learnt }], top = Math.max(1, ...points.map(([, y]) => y)) * 1.2;
  if (floor) curves.push({ points: [[0, floor.loss], [1, floor.loss]], colour: colour.exact, dashed: true });
  const low = (floor?.loss ?? 0.1) / 2, ticks = [0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10].filter((y) => y > low && y < top);
  drawCurves($("learn-loss"), curves, low, top, ticks, [[0, "0"], [1, `step ${Math.max(n, 100)}`]]);
}

function drawErrors() {
  const colour = colours(scheme.matches);
  const curve = (values) => values.map((y, k) => [(k + 0.5) / BINS, y]).filter(([, y]) => y > 0.0001);
  const curves = [{ points: curve(errors), colour: colour.learnt }];
  if (floor) curves.push({ points: curve(floor.errors), colour: colour.exact, dashed: true });
  drawCurves($("learn-errors"), curves, 0.0001, 2, [0.0001, 0.001, 0.01, 0.1, 1], [[0, "0"], [0.5, "t"], [1, "999"]]);
}

/** Draw what has changed, some times a second, and say where the training is. */
function paint() {
  if (dirty) {
    dirty = false;
    for (const each of [drawBatch, drawFields, drawSamples, drawLoss, drawErrors]) each();
    const recent = losses.slice(-100), mean = recent.reduce((a, b) => a + b, 0) / recent.length;
    const off = samples && judged(samples.x0, centres, STD).off;
    $("learn-status").textContent = !losses.length ? "Not trained yet: press Start, or take one step."
      : `Step ${trainer.steps.toLocaleString("en")}: the mean loss of the last ${recent.length} ${recent.length > 1 ? "batches" : "batch"} is ${mean.toPrecision(3)}`
        + (floor ? `, ${(mean / floor.loss).toFixed(2)} times the floor.` : ".")
        + (samples ? ` ${off} of ${SAMPLES} samples (${samples.how}) ${off === 1 ? "is" : "are"} more than ${3 * STD} from the data.` : "");
  }
  setTimeout(() => requestAnimationFrame(paint), 120);
}

function showHints() {
  const said = Object.entries(HINTS).map(([name, texts]) => {
    const control = $(`learn-${name}`);
    return texts[control.type === "checkbox" ? control.checked : control.value];
  });
  $("learn-hint").textContent = said.filter(Boolean).join(" ");
}

/** The same training for docs/points.py, as text. */
function inPython() {
  const rows = [];
  for (let k = 0; k < centres.length; k += 2) rows.push(`[${centres[k].toFixed(3)}, ${centres[k + 1].toFixed(3)}]`);
  const [target, weights] = [trainer.target, trainer.weights];
  return [
    `# Run this in the folder docs. Each point stands for a Gaussian with a standard deviation of ${STD}; this network is larger than the one on the page.`,
    "from points import *",
    `data = torch.tensor([${rows.join(", ")}])[..., None, None]`,
    "diffusion = Diffusion(linear_betas())",
    `draw = lambda n: data[torch.randint(len(data), (n,))] + ${STD} * torch.randn(n, 2, 1, 1)`,
    `eps = fit(diffusion, draw, "${weights}", "${target}", steps=${Math.max(1000, trainer.steps)}, batch=${BATCH}, lr=${trainer.rate}, width=${trainer.parameters[1].length})`,
    `x0 = sample(diffusion, eps, (1000, 2, 1, 1), ${$("plane-steps").value}, "${$("plane-sampler").value}")`,
    "figure = Figure()",
    "figure.subplots().scatter(*x0.flatten(1).T, 2)",
    'figure.savefig("samples.png")',
  ].join("\n");
}

/** Make the section work. */
export function startLearning() {
  followData((points) => {
    cloud = points;
    restart();
  });
  for (const name of ["target", "weights", "width", "rate", "data"]) $(`learn-${name}`).onchange = restart;
  $("learn-average").onchange = () => {
    showHints();
    [dirty, stale] = [true, true];
  };
  for (const name of ["learn-guidance", "plane-sampler", "plane-steps"]) {
    $(name).addEventListener("change", () => { stale = true; });
  }
  $("learn-t").oninput = () => { dirty = true; };
  $("learn-start").onclick = () => {
    running = !running;
    $("learn-start").textContent = running ? "Pause" : "Start";
    if (running) train();
  };
  $("learn-step").onclick = () => {
    if (!running) step();
  };
  $("learn-again").onclick = restart;
  $("learn-use").onchange = ({ target }) => useNetwork(target.checked ? (x, t) => eps(x, levels(x, t)) : null);
  $("learn-python").ontoggle = () => { $("learn-code").textContent = inPython(); };
  scheme.addEventListener("change", () => { dirty = true; });
  sampleLoop();
  paint();
}
