// Points in the plane: clouds of points, the exact noise prediction for them, and the first section of
// the page, which shows both. Nothing is trained: for points, E[eps | x_t] has a closed form.
//
// Numbers in brackets are equations of the paper. B points are a Float32Array of 2 B numbers.

import { ABAR, BETAS, T, noiseOf, sampleChanged, uniform } from "./sampler.js";

export const STD = 0.02; // of the Gaussian around each point of the data
const N = 300; // points that run
const LIMIT = 2.3; // of the view

// ------------------------------------------------------------------------------------- closed forms

/** E[eps | x_t] for a mixture of Gaussians with these centres, of the deviation std. */
export function exactEps(x, abar, centres, std) {
  const signal = Math.sqrt(abar), variance = abar * std ** 2 + 1 - abar; // of each Gaussian at t
  const eps = new Float32Array(x.length), exponents = new Float64Array(centres.length / 2);
  for (let k = 0; k < x.length; k += 2) {
    let largest = -Infinity;
    for (let m = 0; m < centres.length; m += 2) {
      const square = (x[k] - signal * centres[m]) ** 2 + (x[k + 1] - signal * centres[m + 1]) ** 2;
      exponents[m / 2] = -square / (2 * variance);
      largest = Math.max(largest, exponents[m / 2]);
    }
    let total = 0, right = 0, down = 0; // the posterior weights, and the weighted offsets
    for (let m = 0; m < centres.length; m += 2) {
      const weight = Math.exp(exponents[m / 2] - largest);
      total += weight;
      right += weight * (x[k] - signal * centres[m]);
      down += weight * (x[k + 1] - signal * centres[m + 1]);
    }
    const scale = Math.sqrt(1 - abar) / (variance * total);
    eps[k] = scale * right;
    eps[k + 1] = scale * down;
  }
  return eps;
}

/** The density of x_t on an n x n grid over the view, from the top left, up to a factor. */
export function density(n, abar, centres, std) {
  const variance = abar * std ** 2 + 1 - abar, signal = Math.sqrt(abar), q = new Float64Array(n * n);
  const place = (i) => ((i + 0.5) / n * 2 - 1) * LIMIT;
  const bells = (centre) => Float64Array.from({ length: n }, (_, i) =>
    Math.exp(-((place(i) - signal * centre) ** 2) / (2 * variance)));
  for (let m = 0; m < centres.length; m += 2) {
    const across = bells(centres[m]), down = bells(-centres[m + 1]);
    for (let row = 0; row < n; row++) {
      for (let column = 0; column < n; column++) q[row * n + column] += down[row] * across[column];
    }
  }
  return q;
}

/** {off, reached}: how many points are farther than three deviations from each centre, and how many
 * centres are the nearest one of some of the others. */
export function judged(points, centres, std) {
  const reached = new Set();
  let off = 0;
  for (let k = 0; k < points.length; k += 2) {
    let nearest = Infinity, which;
    for (let m = 0; m < centres.length; m += 2) {
      const distance = Math.hypot(points[k] - centres[m], points[k + 1] - centres[m + 1]);
      if (distance < nearest) [nearest, which] = [distance, m];
    }
    if (nearest > 3 * std) off++;
    else reached.add(which);
  }
  return { off, reached: reached.size };
}

// --------------------------------------------------------------------------------- clouds of points

/** `count` points by a function of three uniform numbers that returns [x, y]. */
function cloud(count, place) {
  const random = uniform(1, 0);
  return Float32Array.from(Array.from({ length: count }, () => place(random(), random(), random())).flat());
}

/** Whether a point of the two moons is on the first one, x = 0.6 (cos - 0.5), y = 0.6 (sin - 0.25). */
const upper = (x, y) => Math.abs(Math.hypot(x / 0.6 + 0.5, y / 0.6 + 0.25) - 1) < 1e-4 && y / 0.6 + 0.25 >= 0;

const CLOUDS = {
  "two moons": () => cloud(240, (a, b) => {
    const [x, y] = [Math.cos(Math.PI * a), Math.sin(Math.PI * a)];
    return b < 0.5 ? [0.6 * (x - 0.5), 0.6 * (y - 0.25)] : [0.6 * (0.5 - x), 0.6 * (0.25 - y)];
  }),
  "two moons, two classes": () => {
    const points = CLOUDS["two moons"](), labels = [];
    for (let k = 0; k < points.length; k += 2) labels.push(Number(upper(points[k], points[k + 1])));
    return Object.assign(points, { labels });
  },
  "three groups": () => cloud(150, (a, b, c) => {
    const [x, y] = [[-0.6, -0.5], [0, 0.6], [0.6, -0.2]][Math.floor(3 * a)];
    const radius = 0.1 * Math.sqrt(-2 * Math.log(1 - b)); // the Box-Muller transform
    return [x + radius * Math.cos(2 * Math.PI * c), y + radius * Math.sin(2 * Math.PI * c)];
  }),
  "a ring": () => cloud(200, (a) => [0.8 * Math.cos(2 * Math.PI * a), 0.8 * Math.sin(2 * Math.PI * a)]),
  "the letters DDPM": () => {
    const canvas = new OffscreenCanvas(200, 200), context = canvas.getContext("2d"), points = [];
    context.font = "bold 105px sans-serif";
    context.textAlign = "center";
    context.fillText("DD", 100, 90, 190);
    context.fillText("PM", 100, 190, 190);
    const { data } = context.getImageData(0, 0, 200, 200), random = uniform(1, 0);
    while (points.length < 800) {
      const [x, y] = [Math.floor(200 * random()), Math.floor(200 * random())];
      if (data[4 * (200 * y + x) + 3] > 128) points.push(x / 100 - 1, 1 - y / 100);
    }
    return Float32Array.from(points);
  },
  "three to one": () => Float32Array.of(0.7, 0.7, 0.8, 0.6, 0.6, 0.8, -0.7, -0.7),
  "one point": () => Float32Array.of(0.4, 0.3),
};

// -------------------------------------------------------------------------------------- the section

/** What a reader may change in the method, by its name in sampleChanged; noClip is clip: false. */
export const CHANGES = {
  withoutZ: "leave out the noise z",
  noClip: "do not clip x̂₀ to −1 … 1",
  short: "use only T = 100 levels, with the same range of betas",
  lastNoise: "add noise in the last step",
};

/**
 * Fill a fieldset with a box for each change. The paragraph after it says what the ticked ones do.
 *
 * prefix: of the ids of the boxes. texts: what to say, by the name of the change. Returns a function
 * that returns {name: ticked}.
 */
export function offerChanges(fieldset, prefix, texts, onchange) {
  const boxes = {}, names = Object.keys(CHANGES);
  for (const name of names) {
    const label = fieldset.appendChild(document.createElement("label"));
    boxes[name] = label.appendChild(document.createElement("input"));
    label.append(` ${CHANGES[name]}`);
    Object.assign(boxes[name], { type: "checkbox", id: prefix + name });
    boxes[name].onchange = () => {
      const said = names.filter((other) => boxes[other].checked).map((other) => texts[other]);
      fieldset.nextElementSibling.textContent = said.join(" ");
      onchange();
    };
  }
  return () => Object.fromEntries(names.map((name) => [name, boxes[name].checked]));
}

const TEXTS = {
  withoutZ: "Without z, each step of Algorithm 2 moves a point to the mean of its possible next positions, which draws the points towards the middle of the data. They still end on the data, but they gather on very few of the data points. DDIM and DPM-Solver++ never add z; their steps keep the spread in another way.",
  noClip: "Without the clip, x̂₀ may leave the square from −1 to 1. Here it is an average of the data, so it stays inside if they do. The output of a network is less reliable while t is large.",
  short: "With 100 levels and the same range of betas, the last level still contains 60 % of x₀ (√ᾱ = 0.6), but sampling begins with pure noise, whose mean is 0. Choose the data “three to one”: more than a quarter of the points end at the lower left.",
  lastNoise: "With noise in the last step, the result is x₀ with grain. With 1000 steps, you can hardly see the grain. With 10 steps, the last step is large, so it adds much more noise.",
};

export const $ = (id) => document.getElementById(id);
export const scheme = matchMedia("(prefers-color-scheme: dark)");
const COLOURS = ["#d9480f", "#0b7285", "#9c36b5", "#2b8a3e"];

let centres = CLOUDS["two moons"](); // of the data, perhaps with their labels
let learnt = null; // eps(x, t) of a network, in place of the closed form
let heirs = []; // what is called when the data change
let changesOf; // a function that returns what the reader changes
let starts = [[-1.3, 1.5]]; // x_T of the coloured paths: the last four that the reader chose
let drawn = false; // whether the reader drew the data
let frames = []; // of the chain: {t, x, x0}, from T-1 down, and the result as {t: -1, x: x0}
let chain = 0; // the number of the chain that is computed
let playing = false;
let cursor = [0, 0]; // of the keyboard
let stroke = false; // whether the pointer draws data

const announce = (text) => { $("plane-status").textContent = text; };

/** Compute the chain anew, from the same noise. Does not block: it pauses after some milliseconds. */
async function compute() {
  const number = ++chain, drawNoise = noiseOf(0, N + starts.length, 2), xT = drawNoise();
  starts.flat().forEach((value, k) => { xT[2 * N + k] = value; });
  const changes = changesOf();
  const [sampler, steps] = [$("plane-sampler").value, Number($("plane-steps").value)];
  const options = { ...changes, clip: !changes.noClip, sampler, steps, xT };
  frames = [];
  let began = performance.now();
  for await (const frame of sampleChanged(epsOf, drawNoise, BETAS, options)) {
    if (number !== chain) return; // another one has begun
    frames.push(frame);
    if (performance.now() - began > 12) {
      draw();
      await new Promise((resolve) => setTimeout(resolve));
      began = performance.now();
    }
  }
  if (number !== chain) return;
  frames.push({ t: -1, x: frames.at(-1).x0, x0: frames.at(-1).x0 });
  draw();
  if (!playing && $("plane-t").value < 0) report();
}

/** The noise that is expected at x: of the closed form, or of a network. */
const epsOf = (x, t) => learnt ? learnt(x, t) : exactEps(x, ABAR[t], centres, STD);

/** Let the plane use eps(x, t) of a network, or null for the closed form. */
export function useNetwork(eps) {
  learnt = eps;
  compute();
}

/** Call a function with the data, now and when they change: points, which may have labels. */
export function followData(call) {
  heirs.push(call);
  call(centres);
}

/** The frame to show at the slider's t: the first one that is not above it. */
function frameAt(t) {
  return frames.find((frame) => frame.t <= t) ?? frames.at(-1);
}

/** Clear a square canvas that shows the plane from -limit to limit: {context, size, dark, at, dot}. */
export function clearPlane(canvas, limit = LIMIT) {
  const context = canvas.getContext("2d"), size = canvas.width, dark = scheme.matches;
  const at = (x, y) => [(x / limit + 1) * size / 2, (1 - y / limit) * size / 2];
  const dot = (x, y, radius) => {
    context.beginPath();
    context.arc(...at(x, y), radius * size, 0, 2 * Math.PI);
  };
  context.fillStyle = dark ? "#14161a" : "#ffffff";
  context.fillRect(0, 0, size, size);
  return { context, size, dark, at, dot };
}

/** Draw points as dots in a colour. radius: relative to the canvas. */
export function drawDots({ context, dot }, points, radius, colour, alpha = 1) {
  [context.fillStyle, context.globalAlpha] = [colour, alpha];
  for (let k = 0; k < points.length; k += 2) {
    dot(points[k], points[k + 1], radius);
    context.fill();
  }
  context.globalAlpha = 1;
}

/** Draw the plane at the t of the slider, whose last place, -1, is the result. */
function draw() {
  const canvas = $("plane"), t = Number($("plane-t").value), abar = t < 0 ? 1 : ABAR[t];
  const plane = clearPlane(canvas), { context, size, dark, at, dot } = plane;
  if ($("show-density").checked) drawDensity(context, size, abar, dark);
  drawDots(plane, centres, 0.005, dark ? "#8ab0ff" : "#2156c9", t < 0 ? 0.3 : 0.5);
  if ($("show-field").checked && t >= 0) drawField(plane, (x) => epsOf(x, t), dark ? "#ced4da" : "#495057");
  const frame = frames.length && frameAt(t);
  if (frame && $("show-points").checked) {
    drawDots(plane, frame.x.subarray(0, 2 * N), 0.0045, dark ? "#f1f3f5" : "#1d2026");
  }
  if (frame) starts.forEach((_, k) => drawPath(plane, frame, N + k, COLOURS[k % COLOURS.length]));
  if (document.activeElement === canvas && canvas.matches(":focus-visible")) {
    context.strokeStyle = dark ? "#ffffff" : "#000000";
    dot(...cursor, 0.02);
    context.stroke();
  }
  $("plane-at").textContent = t < 0 ? "the result" : `t = ${t}`;
  $("plane-signal").textContent = Math.sqrt(abar).toFixed(3);
  $("plane-noise").textContent = Math.sqrt(1 - abar).toFixed(3);
}

function drawDensity(context, size, abar, dark) {
  const n = 96, q = density(n, abar, centres, Math.max(STD, 0.035)), largest = q.reduce((a, b) => Math.max(a, b));
  const small = new OffscreenCanvas(n, n), image = new ImageData(n, n), rgb = dark ? [138, 176, 255] : [33, 86, 201];
  q.forEach((value, k) => image.data.set([...rgb, 150 * Math.sqrt(value / largest)], 4 * k));
  small.getContext("2d").putImageData(image, 0, 0);
  context.drawImage(small, 0, 0, size, size);
}

/** Draw arrows along -eps(x), the direction in which the noise is removed. */
export function drawField({ context, at }, eps, colour) {
  const n = 15, cell = (2 * LIMIT) / n;
  const grid = Float32Array.from({ length: 2 * n * n }, (_, k) =>
    (((k % 2 ? Math.floor(k / 2 / n) : (k >> 1) % n) + 0.5) / n * 2 - 1) * LIMIT);
  const noise = eps(grid);
  context.strokeStyle = colour;
  context.lineWidth = 1.5;
  for (let k = 0; k < grid.length; k += 2) {
    const length = Math.hypot(noise[k], noise[k + 1]), scale = (-0.75 * cell * Math.min(1, length / 2.5)) / length;
    const from = [grid[k], grid[k + 1]], to = [grid[k] + scale * noise[k], grid[k + 1] + scale * noise[k + 1]];
    const [[x0, y0], [x1, y1]] = [at(...from), at(...to)], angle = Math.atan2(y1 - y0, x1 - x0);
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    for (const turn of [2.6, -2.6]) {
      context.moveTo(x1, y1);
      context.lineTo(x1 + 5 * Math.cos(angle + turn), y1 + 5 * Math.sin(angle + turn));
    }
    context.stroke();
  }
}

/** The path of point k until this frame, and a ring at its estimate of x_0. */
function drawPath({ context, at, dot }, until, k, colour) {
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = 2;
  context.beginPath();
  for (const { t, x } of frames) {
    if (t < until.t) break;
    context.lineTo(...at(x[2 * k], x[2 * k + 1]));
  }
  context.stroke();
  const { x, x0 } = until;
  dot(x[2 * k], x[2 * k + 1], until.t < 0 ? 0.006 : 0.011);
  context.fill();
  context.setLineDash([4, 4]);
  context.beginPath();
  context.moveTo(...at(x[2 * k], x[2 * k + 1]));
  context.lineTo(...at(x0[2 * k], x0[2 * k + 1]));
  context.stroke();
  context.setLineDash([]);
  dot(x0[2 * k], x0[2 * k + 1], 0.016);
  context.stroke();
}

// ---- playing

/** Move the slider down to the result, from where it is; about six seconds for all, slowly twenty. */
function play() {
  if (playing) return stop();
  if (Number($("plane-t").value) < 0) $("plane-t").value = T - 1;
  playing = true;
  $("plane-play").textContent = "Pause";
  announce("Sampling …");
  let before = null, t = Number($("plane-t").value);
  requestAnimationFrame(function move(now) {
    if (!playing) return;
    t -= (T * (before === null ? 0 : now - before)) / ($("plane-slow").checked ? 20_000 : 6_000);
    before = now;
    $("plane-t").value = Math.max(-1, Math.round(t));
    draw();
    if (t > -1) requestAnimationFrame(move);
    else stop();
  });
}

function stop() {
  playing = false;
  $("plane-play").textContent = "Play";
  report();
}

/** Say what the reader sees; for those who do not see it, too. */
function report() {
  const t = Number($("plane-t").value), last = frames.at(-1);
  if (t >= 0 || !(last?.t < 0)) return announce(t < 0 ? "Computing …" : `Stopped at t = ${t}.`);
  const { off, reached } = judged(last.x.subarray(0, 2 * N), centres, STD), steps = frames.length - 1;
  const how = `${$("plane-sampler").selectedOptions[0].text}, ${steps} step${steps > 1 ? "s" : ""}`;
  announce(`${how}: ${off} of ${N} points ${off === 1 ? "ends" : "end"} more than ${3 * STD} from the data; the others reach ${reached} of ${centres.length / 2} data points.`);
}

/** Go to the next state of the chain that is lower (1) or higher (-1) than the one shown. */
function step(direction) {
  if (playing) stop();
  const shown = frames.indexOf(frameAt(Number($("plane-t").value)));
  const next = frames[Math.min(frames.length - 1, Math.max(0, shown + direction))];
  if (!next) return;
  $("plane-t").value = next.t;
  draw();
  report();
}

// ---- choosing

function useData(points) {
  centres = points;
  for (const call of heirs) call(points);
  compute();
}

/** Draw a point of data, or start a path, at this place. */
function act(x, y) {
  if ($("plane-mode").value === "start") {
    starts = [...starts.slice(-3), [x, y]];
    compute();
    if (!playing) {
      $("plane-t").value = T - 1;
      play();
    }
    return;
  }
  const clipped = [x, y].map((value) => Math.min(1, Math.max(-1, value)));
  const own = drawn ? [...centres] : [];
  $("plane-data").value = "own";
  drawn = true;
  useData(Float32Array.from([...own, ...clipped].slice(-800)));
}

function placeOf({ offsetX, offsetY }) {
  const { clientWidth, clientHeight } = $("plane");
  return [((2 * offsetX) / clientWidth - 1) * LIMIT, (1 - (2 * offsetY) / clientHeight) * LIMIT];
}

/** Make the section work. */
export function startPlane() {
  $("plane-data").prepend(...Object.keys(CLOUDS).map((name) => new Option(name)));
  $("plane-data").value = "two moons";
  $("plane-data").onchange = ({ target }) => {
    drawn = false; // the first point that the reader draws replaces the cloud
    if (target.value !== "own") return useData(CLOUDS[target.value]());
    $("plane-mode").value = "data";
    announce("Draw some points in the plane.");
  };
  for (const name of ["plane-sampler", "plane-steps"]) $(name).onchange = compute;
  changesOf = offerChanges($("plane-changes"), "", TEXTS, compute);
  for (const name of ["density", "field", "points"]) $(`show-${name}`).onchange = draw;
  $("plane-t").oninput = () => {
    if (playing) stop();
    draw();
  };
  $("plane-t").onchange = report;
  $("plane-play").onclick = play;
  $("plane-next").onclick = () => step(1);
  $("plane-back").onclick = () => step(-1);
  const canvas = $("plane");
  canvas.onpointerdown = (event) => {
    stroke = $("plane-mode").value === "data";
    canvas.setPointerCapture(event.pointerId);
    act(...placeOf(event));
  };
  canvas.onpointermove = (event) => stroke && act(...placeOf(event));
  canvas.onpointerup = canvas.onpointercancel = () => { stroke = false; };
  canvas.onkeydown = (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    if (move) cursor = cursor.map((value, k) => Math.min(LIMIT, Math.max(-LIMIT, value + 0.05 * move[k])));
    else act(...cursor);
    draw();
  };
  canvas.onfocus = canvas.onblur = draw;
  scheme.addEventListener("change", draw);
  compute();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
}
