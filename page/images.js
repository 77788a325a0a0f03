// Section 3: images. Samples of the network, step by step, compared with earlier runs.

import { $, announce, bind, changesOf, CHANGES, offerChanges } from "./common.js";
import { drawImages, toPixels } from "./plane.js";
import { follow, modelOf, network, reverse, tell, work } from "./reverse.js";
import { closest, noiseOf, partsAt } from "./sampler.js";

const KEPT = 60; // frames of each earlier run
const QUICK = 50; // so many steps are taken again when a control changes
const RECORDED = { name: "Algorithm 2, 1000 steps, all in turn (recorded)", seed: 0, count: 16 };
const SAMPLERS = { "sa-solver": "SA-Solver", ddim: "DDIM", ddpm: "Algorithm 2" };
const TEXTS = { // of the changes
  withoutZ: "Without fresh noise, each step of Algorithm 2 moves to the mean of the possible next images, so the results are smooth shapes that have no detail and all look alike.",
  noClip: "Now the estimate may leave the range of pixel values while there is much noise.",
  short: "With a tenth of the levels, the last level still contains much of the image, but sampling begins with pure noise.",
  lastNoise: "With noise in the last step, the images have grain, which is stronger with fewer steps.",
};

const state = {
  steps: 10, sampler: "sa-solver", count: 16, seed: 0, class: "all", w: 0, step: 0, other: "",
  withoutZ: false, noClip: false, short: false, lastNoise: false,
};
let frames = []; // of the run that is shown: {t, sigma, x, x0}, pixels; t = -1 is the result
let shown = { name: "", shape: [1, 32, 32] }; // this run
let runs = []; // all until now: {name, seed, count, frames}, the recording first
let show; // the state in the controls

/** Show a recorded run, if nothing else is shown yet. */
export function showRecorded(recorded) {
  if (frames.length || work.busy) return;
  frames = [...recorded, { t: -1, sigma: 0, x: recorded.at(-1).x0, x0: recorded.at(-1).x0 }];
  shown = { ...RECORDED, frames, shape: [1, 32, 32] };
  runs = [shown];
  state.step = frames.length - 1;
  render();
}

async function draw() {
  const { count, seed, steps: wanted, sampler, w } = state, { betas, variance, size, shape } = network;
  if (!Number.isInteger(seed) || seed < 0 || seed > 2 ** 32 - 1) {
    await work.stop();
    return tell(["status"], "The seed must be a whole number from 0 to 4294967295.", { isError: true });
  }
  const [changes, ticked] = changesOf(state), T = changes.short ? Math.ceil(betas.length / 10) : betas.length;
  const steps = Math.min(wanted, T), options = { ...changes, sampler, steps, variance };
  const words = [`${SAMPLERS[sampler]}, ${steps} steps`];
  if (network.classes.length) words.push($("image-class").selectedOptions[0].text);
  if (w) words.push(`w = ${w}`);
  const run = { name: [...words, ...ticked.map((name) => CHANGES[name])].join(", "), seed, count, shape };
  const model = modelOf(state.class, count, w), own = [];
  return reverse("status", `${count} images`, model, noiseOf(seed, count, size), betas, options, (step, milliseconds, isLast) => {
    const { t, x, x0, sigma } = step;
    if (!own.length) [frames, shown] = [own, run]; // only now: the run before may still be at work
    own.push({ t, sigma, x: toPixels(x), x0: toPixels(x0) });
    if (isLast) own.push({ ...own.at(-1), t: -1, x: own.at(-1).x0 });
    state.step = own.length - 1;
    $("image-time").textContent = `${milliseconds.toFixed(0)} ms for one prediction on ${network.device}`;
    if (isLast) keep(run, own);
    render();
  });
}

/** Keep a run, to be compared with others from the same noise. */
function keep(run, own) {
  const each = Math.ceil(own.length / KEPT);
  run.frames = own.filter((_, k) => k % each === 0 || k === own.length - 1);
  runs = runs.filter(({ name, seed, count }) => name !== run.name || seed !== run.seed || count !== run.count);
  runs.push(run);
  if (runs.length > 12) runs.splice(1, 1); // the recording stays
}

/** Show the state in the controls, the images and the words. */
function render() {
  const ready = network !== null && !isOpening, frame = frames[state.step];
  const others = runs.filter((run) => run !== shown && run.seed === shown.seed && run.count === shown.count);
  $("image-other").replaceChildren(new Option("nothing", ""), ...others.map(({ name }) => new Option(name)));
  $("image-step").max = Math.max(0, frames.length - 1); // before the value, which it limits
  show();
  if (!others.some(({ name }) => name === state.other)) $("image-other").value = "";
  $("stop").disabled = !work.busy;
  $("sample").disabled = !ready;
  $("image-step").disabled = work.busy || !frames.length;
  $("image-w-value").textContent = state.w;
  $("image-change").textContent = changesOf(state)[1].map((name) => TEXTS[name]).join(" ");
  $("progress").value = work.busy && frames.length ? frames.length / (state.steps + 1) : 0;
  if (!frame) return;
  const columns = Math.sqrt(shown.count), [signal, noise] = partsAt(frame.t), isResult = frame.t < 0;
  drawImages($("noise"), frame.x, shown.shape, columns);
  drawImages($("grid"), frame.x0, shown.shape, columns);
  $("image-at").textContent = `${state.step + 1} of ${frames.length}`;
  $("image-shown").textContent = `${shown.name}: ${isResult ? "the result" : `noise level t = ${frame.t}`}`;
  $("image-numbers").textContent = isResult ? "–"
    : `t = ${frame.t}: xₜ = ${signal.toFixed(4)} x₀ + ${noise.toFixed(4)} ε; σₜ = ${frame.sigma.toFixed(4)}`;
  const other = others.find(({ name }) => name === state.other);
  $("comparison").hidden = !other;
  if (!other) return;
  const { t, x0 } = other.frames[closest(other.frames.map((one) => one.t), frame.t)];
  drawImages($("other-grid"), x0, shown.shape, columns);
  drawImages($("difference"), x0.map((value, k) => 128 + (frame.x0[k] - value) / 2), shown.shape, columns);
  $("image-other-at").textContent = t < 0 ? `${other.name}: the result` : `${other.name}: t = ${t}`;
}

async function changed(key) {
  if (key === "step" || key === "other") return render();
  render();
  if (!network || isOpening || !(frames.length || work.busy)) return;
  if (state.steps <= QUICK) draw();
  else {
    await work.stop();
    tell(["status"], `Press Draw to see this change: ${state.steps} steps take a while.`);
  }
}

let isOpening = false;

/** Whether a network is being opened, so that nothing may start. */
export function setOpening(value) {
  isOpening = value;
  render();
}

/** Another network: offer its classes, and forget the images of the one before. */
export function useClasses(opened, keeps) {
  const names = opened.classes.map((name, k) => new Option(name, k)), none = new Option("no class", names.length);
  $("image-class").replaceChildren(new Option("all in turn", "all"), none, ...names);
  state.class = "all";
  if (!names.length) state.w = 0;
  if (!keeps) {
    [runs, frames, shown] = [[], [], { name: "", shape: opened.shape }];
    for (const canvas of [$("noise"), $("grid")]) {
      drawImages(canvas, new Uint8Array(16 * opened.size).fill(128), opened.shape, 4);
    }
    $("comparison").hidden = true;
    $("image-shown").textContent = $("image-at").textContent = "";
  }
  render();
}

/** One of the results, as bytes, or null. */
export function takeResult() {
  const { length } = frames, size = shown.shape.reduce((a, b) => a * b);
  if (!length || size !== network.size) return null;
  const k = takeResult.next++ % shown.count;
  return frames[length - 1].x0.subarray(k * size, (k + 1) * size);
}
takeResult.next = 0;

export function startImages() {
  offerChanges($("image-changes"), "image-");
  show = bind(state, "image-", changed);
  $("sample").onclick = draw;
  $("stop").onclick = () => work.stop();
  $("image-step").onchange = () => announce($("image-shown").textContent);
  follow(render);
  render();
}
