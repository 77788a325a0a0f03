// Section 1: what the arrows are. Points and paths in the plane go from noise to data, step by step.

import { $, Owner, animate, announce, bind, changesOf, levelAt, offerChanges, pause, placeOf } from "./common.js";
import { clear, colours, drawArrows, drawDots, drawHaze, drawLine, drawRing, grid, viewOf } from "./plane.js";
import { CLOUDS, LIMIT, STD, exactEps, judged } from "./points.js";
import { ABAR, BETAS, T, between, noiseOf, partsAt, sampleChanged } from "./sampler.js";

const N = 300; // points that run
const TEXTS = { // what the changes do
  withoutZ: "Without fresh noise, each step of Algorithm 2 moves a point to the mean of its possible next positions, which draws the points towards the middle. They still end on the data, but on very few of the data points. (DDIM and SA-Solver never add noise; their steps keep the spread in another way.)",
  noClip: "Now the estimate may leave the square from −1 to 1. The mean of the data stays inside, so little changes here. The output of a network is less reliable while there is much noise.",
  short: "With 100 levels, the last one still contains 60 % of the data, but sampling begins with pure noise. The count of misses cannot show this error, because the points still end on the data: their shares are wrong. Choose the data “three to one”: more than a quarter of the points end at the lower left.",
  lastNoise: "With noise in the last step, the result has grain. With 1000 steps, you can hardly see it. With 10 steps, the last step is large, so it adds much more noise.",
};
const NAMES = { ddpm: "Algorithm 2", ddim: "DDIM", "sa-solver": "SA-Solver" };

const state = {
  t: T - 1, data: "two moons", steps: 50, straight: false, sampler: "ddim", mode: "path", slow: false,
  density: true, field: true, points: true, network: false,
  withoutZ: false, noClip: false, short: false, lastNoise: false,
};
let centres = CLOUDS[state.data](); // of the data, perhaps with their labels
let starts = [[-1.3, 1.5], [1.7, 0.4]]; // x_T of the coloured paths: the last four of the reader
let frames = []; // of the chain: {t, x, x0}, from T-1 down, and the result as {t: -1, x: x0}
let playing = false, place = 1, cursor = [0, 0]; // place: of the pace, while playing; cursor: of the keyboard
let learnt = null; // eps(x, t) of the network of section 2
let heirs = []; // what is called when the data or the sampler change
let show, ask; // the state in the controls; for a frame
const computing = new Owner();

/** Call a function with the data, the sampler and the steps, now and when they change. */
export function followPlane(call) {
  heirs.push(call);
  call(centres, state);
}

/** What section 2 has learnt until now; the chain of before is shown until the new one is computed. */
export function useLearnt(eps) {
  const isMore = eps !== null && learnt !== null;
  learnt = eps;
  if (state.network && !(isMore && computing.busy)) compute(isMore);
}

/** The noise that is expected at x: of the closed form, or of the network. */
const epsOf = (x, t) => state.network && learnt ? learnt(x, t) : exactEps(x, ABAR[t], centres, STD);

/** Compute the chain anew, from the same noise. Does not block: it pauses after some milliseconds.
 * keeps: whether the one of before is shown until then. */
function compute(keeps = false) {
  const own = [];
  if (!keeps) frames = own;
  computing.start(async (run) => {
    const drawNoise = noiseOf(0, N + starts.length, 2), xT = drawNoise(), [changes] = changesOf(state);
    starts.flat().forEach((value, k) => { xT[2 * N + k] = value; });
    const options = { ...changes, sampler: state.sampler, steps: state.steps, xT };
    let began = performance.now();
    for await (const frame of sampleChanged(epsOf, drawNoise, BETAS, options)) {
      if (run.stopped) return;
      own.push(frame);
      if (performance.now() - began < 12) continue;
      ask();
      await pause(0);
      if (run.stopped) return;
      began = performance.now();
    }
    own.push({ t: -1, x: own.at(-1).x0, x0: own.at(-1).x0 });
    frames = own;
    render();
  });
  render();
}

/** What is shown: {frame, index, level, x}. Between two steps of DDIM, the points are on their way;
 * where the chain is not computed yet, its last state is shown, at its own level. */
function shown() {
  const index = Math.max(0, frames.findLastIndex(({ t }) => t >= state.t)), frame = frames[index];
  if (!frame) return null;
  const moves = state.sampler === "ddim" && frames[index + 1], level = moves ? state.t : frame.t;
  return { frame, index, level, x: moves ? between(frame, level) : frame.x };
}

const isComplete = () => frames.at(-1)?.t === -1;

// ---- the drawing

/** In the coordinates of straight paths, a point is divided by this number. */
function scaleAt(level) {
  const [signal, noise] = partsAt(level);
  return state.straight ? signal + noise : 1;
}

function draw() {
  const plane = clear($("plane")), now = shown(), level = now?.level ?? state.t, scale = scaleAt(level);
  const [signal, noise] = partsAt(level), scaled = (x, by) => x.map((value) => value * by);
  if (state.density) drawHaze(plane, signal ** 2, centres, Math.max(STD, 0.035), scale);
  drawDots(plane, scaled(centres, signal / scale), 1.8, colours.data, 0.6);
  if (state.field && level >= 0) {
    const places = grid(plane), x = scaled(places, scale), eps = epsOf(x, Math.round(level));
    const ways = state.straight ? x.map((value, k) => (value - noise * eps[k]) / signal - eps[k]) : scaled(eps, -1);
    drawArrows(plane, places, ways, colours.arrow);
  }
  if (now && state.points) drawDots(plane, scaled(now.x.subarray(0, 2 * N), 1 / scale), 2.4, colours.ink, 0.85);
  const paths = [colours.lit, colours.other, colours.data, colours.dim];
  if (now) starts.forEach((_, k) => drawPath(plane, now, N + k, paths[k % 4]));
  if (document.activeElement === $("plane") && $("plane").matches(":focus-visible")) {
    drawRing(plane, cursor, 9, colours.ink, 1.5);
  }
}

/** The path of point k until now, and a ring at its estimate of x_0. */
function drawPath(plane, { frame, index, level, x }, k, colour) {
  const own = ({ t, x, x0 }) => ({ t, x: x.subarray(2 * k, 2 * k + 2), x0: x0.subarray(2 * k, 2 * k + 2) });
  const places = [], parts = state.sampler === "ddim" && frames.length < 60 ? 10 : 1;
  const add = (x, level) => places.push(Array.from(x, (value) => value / scaleAt(level)));
  for (let i = 0; i <= index; i++) {
    const end = i < index ? frames[i + 1].t : level, { t } = frames[i];
    add(own(frames[i]).x, t);
    for (let part = 1; part < parts && end < t; part++) {
      const middle = t + ((end - t) * part) / parts;
      add(between(own(frames[i]), middle), middle);
    }
  }
  add(x.subarray(2 * k, 2 * k + 2), level);
  drawLine(plane, places, colour, 2.2);
  const to = own(frame).x0;
  drawLine(plane, [places.at(-1), to], colour, 1.5, [4, 5]);
  drawDots(plane, places.at(-1), 5, colour);
  drawRing(plane, to, 7.5, colour);
}

// ---- what it says

/** Show the state in the controls and in words; draw it in the next frame. */
function render() {
  show();
  const level = shown()?.level ?? state.t, [signal, noise] = partsAt(level);
  $("plane-at").textContent = level < 0 ? "the result" : `t = ${Math.round(level)}`;
  $("plane-parts").textContent = `${signal.toFixed(3)} x₀ + ${noise.toFixed(3)} ε`;
  $("plane-play").textContent = playing ? "Pause" : level < T - 1 && level >= 0 ? "Continue" : "Play";
  $("plane").style.touchAction = state.mode === "data" ? "none" : "pan-y pinch-zoom";
  $("plane-change").textContent = changesOf(state)[1].map((name) => TEXTS[name]).join(" ");
  const [words, count] = sentences(level);
  $("plane-status").textContent = words;
  $("plane-count").textContent = count;
  ask();
}

function sentences(level) {
  if (!centres.length) return ["Draw some points in the plane.", ""];
  if (playing) return ["The points follow the arrows …", ""];
  if (state.t >= 0) return [level < T - 1 ? `Stopped at t = ${state.t}.` : "Press Play, or click in the plane to start a path there.", ""];
  if (!isComplete()) return ["Computing …", ""];
  const { off, reached } = judged(frames.at(-1).x.subarray(0, 2 * N), centres, STD), steps = frames.length - 1;
  const n = centres.length / 2, usual = n * (1 - (1 - 1 / n) ** (N - off)), share = (100 * off) / N;
  const how = `${NAMES[state.sampler]}, ${steps} step${steps > 1 ? "s" : ""}${state.network && learnt ? ", with the network of section 2" : ""}`;
  const verdict = share <= 4 ? "good" : share <= 12 ? "fair" : "poor";
  return [`${how}: ${share.toFixed(0)} % of the points miss the data: ${verdict} (perfect: 1 %).`,
    `${off} of ${N} points end more than ${3 * STD} from the data (perfect: 3); the others reach ${reached} of ${n} data points (perfect: about ${usual.toFixed(0)}).`];
}

/** Say the result to those who do not see it. */
const report = () => announce($("plane-status").textContent);

// ---- what happens

/** Move down to the result, from where it is. */
function play() {
  if (playing || !centres.length) return stop();
  if (state.t < 0) state.t = T - 1;
  playing = true;
  place = placeOf(state.t);
  render();
}

function advance(passed) {
  place -= passed / (state.slow ? 24_000 : 8_000);
  state.t = Math.max(-1, Math.round(levelAt(Math.max(0, place))));
  if (state.t < 0) playing = false;
  render();
  if (!playing) report();
}

function stop() {
  playing = false;
  render();
}

/** Go to the next state of the chain that is lower (1) or higher (-1) than the one shown. */
function step(direction) {
  playing = false;
  const now = shown(), back = direction < 0 && now?.level < now?.frame.t; // to the beginning of this step
  state.t = (frames[now?.index + (back ? 0 : direction)] ?? { t: state.t }).t;
  render();
}

function useData(points) {
  centres = points;
  [playing, state.t] = [false, T - 1];
  tellHeirs();
  if (points.length) compute();
  else {
    frames = [];
    computing.stop();
    render();
  }
}

const tellHeirs = () => heirs.forEach((call) => centres.length && call(centres, state));

/** Draw a point of data, or start a path, at this place. */
function act(x, y) {
  if (state.mode === "data") {
    const own = state.data === "own" ? [...centres] : [], clipped = [x, y].map((v) => Math.min(1, Math.max(-1, v)));
    state.data = "own";
    return useData(Float32Array.from([...own, ...clipped].slice(-800)));
  }
  starts = [...starts.slice(-3), [x, y]];
  if (!playing) state.t = T - 1;
  compute();
  if (!playing) play();
}

function changed(key) {
  if (key === "t") playing = false;
  if (key === "data") {
    state.mode = state.data === "own" ? "data" : "path";
    return useData(state.data === "own" ? new Float32Array() : CLOUDS[state.data]());
  }
  if (key === "mode" && state.mode === "data" && state.data !== "own") {
    state.data = "own";
    return useData(new Float32Array());
  }
  if (key === "sampler" || key === "steps") tellHeirs();
  if (["t", "mode", "slow", "straight", "density", "field", "points"].includes(key)) render();
  else compute();
}

/** Make the section work. */
export function startArrows() {
  const canvas = $("plane");
  $("plane-data").prepend(...Object.keys(CLOUDS).map((name) => new Option(name)));
  offerChanges($("plane-changes"), "plane-");
  show = bind(state, "plane-", changed);
  ask = animate(canvas, (passed) => {
    if (playing) advance(passed);
    draw();
    return playing;
  });
  $("plane-t").onchange = report;
  $("plane-play").onclick = play;
  $("plane-next").onclick = () => step(1);
  $("plane-back").onclick = () => step(-1);
  const placeIn = ({ offsetX, offsetY }) => viewOf(canvas).place(offsetX, offsetY).map((v) => v * scaleAt(T - 1));
  canvas.onclick = (event) => state.mode === "path" && act(...placeIn(event));
  canvas.onpointerdown = (event) => {
    if (state.mode !== "data") return;
    canvas.setPointerCapture(event.pointerId);
    act(...placeIn(event));
  };
  canvas.onpointermove = (event) => canvas.hasPointerCapture(event.pointerId) && act(...placeIn(event));
  canvas.onkeydown = (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    if (move) cursor = cursor.map((value, k) => Math.min(LIMIT, Math.max(-LIMIT, value + 0.05 * move[k])));
    else act(...cursor);
    render();
  };
  canvas.onfocus = canvas.onblur = ask;
  compute();
}
