// The sections of the page that use a network: samples, a drawing, and the choice of the network.

import { Network } from "./network.js";
import { startLearning } from "./learn.js";
import { $, CHANGES, offerChanges, startPlane } from "./points.js";
import { alphasBar, closest, guided, linearBetas, noiseOf, qSample, sampleChanged } from "./sampler.js";

const SHIPPED = "fashion-mnist.onnx", RUNTIME = "onnxruntime-web@1.30.0";
// Where it is: beside the page, for use without a connection, or else on jsDelivr.
const RUNTIMES = ["node_modules/onnxruntime-web", `https://cdn.jsdelivr.net/npm/${RUNTIME}`]
  .map((folder) => new URL(`${folder}/dist/ort.webgpu.bundle.min.mjs`, import.meta.url).href);
// What docs/make_figures.py has recorded: 16 samples of Algorithm 2 in 1000 steps, of seed 0.
const RECORDED = { file: "recorded.png", frames: 26, betas: linearBetas(), shape: [1, 32, 32], size: 1024 };
const ENDS = 4, END_STEPS = 50; // images drawn from one x_t, and the steps to draw them in
const KEPT = 60; // frames of each earlier run
const TEXTS = { // of the changes
  withoutZ: "Without z, each step of Algorithm 2 moves to the mean of the possible next images, so the results are smooth shapes that have no detail and all look alike.",
  noClip: "Without the clip, x̂₀ may leave the range of pixel values while t is large.",
  short: "With a tenth of the levels and the same range of betas, sampling begins with more noise than the last level had in training.",
  lastNoise: "With noise in the last step, the images have grain, which is stronger with fewer steps.",
};

let network = null; // the open Network
let opening = false; // whether another one is being opened
let run = null; // the reverse process that is running: {stopped, ended}, the latter a promise
let frames = []; // of the last one: {t, sigma, x, x0}, pixels
let runs = []; // all until now: {name, seed, count, frames}, the recording first
let comparable = []; // those that began with the noise of the frames

/** The network, or that of the recording until there is one. */
const shown = () => network ?? RECORDED;

// A link to the lesson works only on GitHub Pages, where the repository's address is known.
const [, owner] = location.hostname.match(/^(.+)\.github\.io$/) ?? [];
for (const link of document.querySelectorAll("[data-lesson]")) {
  const repository = location.pathname.split("/")[1];
  const lesson = `https://github.com/${owner}/${repository}/blob/HEAD/docs/lesson.md`;
  if (owner) link.href = `${lesson}#${link.dataset.lesson}`;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

// ---- pixels

const toPixels = (x) => Uint8ClampedArray.from(x, (value) => Math.round((value + 1) * 127.5));

/** Show images, bytes in the order (B, C, H, W), in rows of `columns` with a gap between them. */
function show(canvas, pixels, columns, gap = 2) {
  const [channels, height, width] = shown().shape, size = channels * height * width;
  const count = pixels.length / size, rows = Math.ceil(count / columns);
  canvas.width = columns * (width + gap) - gap;
  canvas.height = rows * (height + gap) - gap;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let k = 0; k < count; k++) {
    for (let at = 0; at < height * width; at++) {
      for (let c = 0; c < 3; c++) {
        image.data[4 * at + c] = pixels[k * size + (channels === 3 ? c : 0) * height * width + at];
      }
      image.data[4 * at + 3] = 255;
    }
    context.putImageData(image, (k % columns) * (width + gap), Math.floor(k / columns) * (height + gap));
  }
}

/** The image in #draw as x_0: Float32Array (C, H, W) in [-1, 1]. */
function drawing() {
  const [channels, height, width] = network.shape, x0 = new Float32Array(network.size);
  const { data } = $("draw").getContext("2d", { willReadFrequently: true }).getImageData(0, 0, width, height);
  for (let at = 0; at < height * width; at++) {
    const [red, green, blue] = data.subarray(4 * at, 4 * at + 3);
    const values = channels === 3 ? [red, green, blue] : [0.299 * red + 0.587 * green + 0.114 * blue];
    values.forEach((value, c) => { x0[c * height * width + at] = value / 127.5 - 1; });
  }
  return x0;
}

// ---- one reverse process at a time

/** Run the reverse process, and call `each` with every step. The status says how it ends. */
async function reverse(...args) {
  run = { stopped: false };
  run.ended = takeSteps(...args);
  updateControls();
  await run.ended;
  run = null;
  updateControls();
}

async function takeSteps(what, model, drawNoise, betas, options, each) {
  const { steps } = options;
  let done = 0, milliseconds = 0;
  const epsModel = async (x, t) => {
    const began = performance.now();
    const eps = await model(x, t);
    milliseconds += performance.now() - began;
    return eps;
  };
  const began = performance.now();
  try {
    for await (const step of sampleChanged(epsModel, drawNoise, betas, options)) {
      if (run.stopped) break; // while eps was computed
      done++;
      each(step, milliseconds / done);
      $("progress").value = done / steps;
      say(`${what}: step ${done} of ${steps}`);
      await new Promise((resolve) => setTimeout(resolve)); // lets the page paint
      if (run.stopped) break;
    }
    if (opening) return; // the status says what is loading
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say(done === steps ? `${what}: ${steps} step${steps > 1 ? "s" : ""} in ${seconds} s` : `Stopped after step ${done} of ${steps}.`);
  } catch (error) {
    say(explained(error), true);
  }
}

function updateControls() {
  $("stop").disabled = !run;
  $("sample").disabled = $("denoise").disabled = run || opening || !network;
  $("step").disabled = run || !frames.length;
  $("take").disabled = run || !frames.length || !network;
}

function stop() {
  if (run) run.stopped = true;
}

/** What an error of the network means for the user. */
function explained(error) {
  const message = error.message.split("\n")[0];
  if (/out of memory|bad_alloc|allocation failed|memory access/i.test(message)) {
    return `The network does not fit in this browser's memory; try fewer images. (${message})`;
  }
  return `The network failed: ${message}`;
}

// ---- 3. sample

/** The epsModel of `count` images: a value of #class, which is a class or all in turn, and w. */
function modelOf(value, count, w) {
  const n = network.classes.length;
  if (!n) return (x, t) => network.eps(x, t);
  return guided(network, Array.from({ length: count }, (_, k) => value === "all" ? k % n : Number(value)), w);
}

/** Offer the classes of the network, or hide all that belongs to classes. */
function offerClasses() {
  const names = network.classes.map((name, k) => new Option(name, k));
  const none = new Option("no class", names.length);
  $("class").replaceChildren(new Option("all in turn", "all"), none, ...names);
  $("end-class").replaceChildren(...[none, ...names].map((option) => option.cloneNode(true)));
  for (const element of document.querySelectorAll(".classes")) element.hidden = !names.length;
}

/** Sample again with the same noise. Of several changes during one pass, the last one does. */
async function sampleAgain() {
  if (!network || opening || !(run || frames.length)) return;
  const mine = ++sampleAgain.asked;
  stop();
  await run?.ended;
  if (mine === sampleAgain.asked) await sample();
}
sampleAgain.asked = 0;

async function sample() {
  const count = Number($("count").value), seed = Number($("seed").value), { betas, variance } = network;
  const changes = changesOf();
  const T = changes.short ? Math.ceil(betas.length / 10) : betas.length;
  const steps = Math.min(Number($("steps").value), T);
  if (!Number.isInteger(seed) || seed < 0 || seed > 2 ** 32 - 1) {
    return say("The seed must be a whole number from 0 to 4294967295.", true);
  }
  frames = [];
  $("step").value = 0;
  const noise = noiseOf(seed, count, network.size), w = Number($("w").value);
  const options = { ...changes, clip: !changes.noClip, sampler: $("sampler").value, steps, variance };
  const images = `${count} images`, model = modelOf($("class").value, count, w);
  const words = [`${$("sampler").selectedOptions[0].text}, ${steps} steps`];
  if (network.classes.length) words.push($("class").selectedOptions[0].text);
  if (w) words.push(`w = ${w}`);
  for (const change in changes) {
    if (changes[change]) words.push(CHANGES[change]);
  }
  offerRuns(seed, count);
  await reverse(images, model, noise, betas, options, (step, milliseconds) => {
    const { t, x, x0, sigma } = step;
    frames.push({ t, sigma, x: toPixels(x), x0: toPixels(x0) });
    $("step").max = frames.length - 1; // before the value, which it limits
    $("step").value = frames.length - 1;
    $("number-time").textContent = `${milliseconds.toFixed(0)} ms for ${images}`;
    showFrame();
  });
  if (frames.length < steps) return;
  showFrame(); // now beside the result of the other run
  const each = Math.ceil(steps / KEPT), name = words.join(", ");
  const kept = frames.filter((_, k) => k % each === 0 || k === steps - 1);
  runs = runs.filter((other) => other.name !== name || other.seed !== seed || other.count !== count);
  runs.push({ name, seed, count, frames: kept });
  if (runs.length > 12) runs.splice(1, 1); // the recording stays
}

/** Offer the runs that began with the same noise, to be compared with the next one. */
function offerRuns(seed, count) {
  const chosen = comparable.length && $("other").selectedOptions[0].text; // the first, by default
  comparable = runs.filter((other) => other.seed === seed && other.count === count);
  $("other").replaceChildren(...comparable.map(({ name }, k) => new Option(name, k)), new Option("nothing", -1));
  for (const option of $("other").options) option.selected ||= option.text === chosen;
}

function showFrame() {
  const frame = frames[$("step").value];
  if (!frame) return;
  const columns = Math.sqrt(frame.x.length / shown().size), abar = alphasBar(shown().betas)[frame.t];
  show($("noise"), frame.x, columns);
  show($("grid"), frame.x0, columns);
  const other = comparable[$("other").value];
  $("comparison").hidden = !other;
  if (other) { // result beside result, and else the levels that are closest
    const isResult = !run && frame === frames.at(-1), levels = other.frames.map(({ t }) => t);
    const { t, x0 } = other.frames.at(isResult ? -1 : closest(levels, frame.t));
    show($("other-grid"), x0, columns);
    show($("difference"), x0.map((value, k) => 128 + (frame.x0[k] - value) / 2), columns);
    $("other-at").textContent = `${other.name}, at t = ${t}`;
  }
  $("at").textContent = `${Number($("step").value) + 1} of ${frames.length}`;
  $("number-t").textContent = frame.t;
  $("number-signal").textContent = Math.sqrt(abar).toFixed(4);
  $("number-noise").textContent = Math.sqrt(1 - abar).toFixed(4);
  $("number-sigma").textContent = frame.sigma.toFixed(4);
}

// ---- 4. draw, add noise, denoise

let brush = null; // where the brush is, in pixels
let drawn; // the noise of x_t, which stays while the slider moves

/** x_t of the drawing at the t of the slider; shows it. */
function addNoise() {
  const t = Number($("t").value), x_t = qSample(drawing(), t, drawn, network.betas);
  $("t-value").textContent = t;
  show($("noised"), toPixels(x_t), 1);
  return x_t;
}

function paint(x, y) {
  const marks = $("brush").value === "mask", from = brush ?? [x, y];
  const context = $(marks ? "mask" : "draw").getContext("2d");
  context.strokeStyle = marks ? "#ff3b30" : $("colour").value;
  context.lineWidth = Math.max(1.5, network.shape[2] / 12);
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(x + 0.01, y);
  context.stroke();
  brush = [x, y];
  addNoise();
}

/** What is marked, as 0 and 1 for each value of an image, or null if nothing is. */
function marked() {
  const [channels, height, width] = network.shape;
  const { data } = $("mask").getContext("2d", { willReadFrequently: true }).getImageData(0, 0, width, height);
  const mask = Uint8Array.from({ length: network.size }, (_, k) => data[4 * (k % (height * width)) + 3] > 127);
  return mask.includes(1) ? mask : null;
}

function clearMask() {
  $("mask").width = network.shape[2]; // which also clears it
  $("mask").height = network.shape[1];
}

function fill(colour) {
  const canvas = $("draw"), context = canvas.getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, canvas.width, canvas.height);
  addNoise();
}

/** A shirt, so that there is something to begin with. */
function drawShirt() {
  const canvas = $("draw"), [, height, width] = network.shape;
  [canvas.height, canvas.width] = [height, width];
  clearMask();
  fill(network.shape[0] === 1 ? "#000000" : "#ffffff");
  const context = canvas.getContext("2d");
  context.fillStyle = network.shape[0] === 1 ? "#b0b0b0" : "#3a6fd8";
  context.beginPath();
  const outline = [[.34, .1], [.66, .1], [.95, .3], [.86, .45], [.72, .36], [.72, .92], [.28, .92],
    [.28, .36], [.14, .45], [.05, .3]];
  outline.forEach(([x, y]) => context.lineTo(x * width, y * height));
  context.fill();
  addNoise();
}

async function useImage(file) {
  try {
    const bitmap = await createImageBitmap(file), { width, height } = $("draw");
    const side = Math.min(bitmap.width, bitmap.height), context = $("draw").getContext("2d");
    context.imageSmoothingQuality = "high";
    fill("#ffffff");
    context.drawImage(
      bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, width, height,
    );
    addNoise();
    say(`${file.name} is now the drawing.`);
  } catch {
    say(`${file.name} is not an image that this browser can read.`, true);
  }
}

function takeSample() {
  const frame = frames.at(-1), k = takeSample.next++ % (frame.x0.length / network.size);
  show($("draw"), frame.x0.subarray(k * network.size, (k + 1) * network.size), 1);
  addNoise();
}
takeSample.next = 0;

async function denoise() {
  const t = Number($("t").value), mask = marked(), repeat = (image) => {
    const images = new Float32Array(ENDS * network.size);
    for (let k = 0; k < ENDS; k++) images.set(image, k * network.size);
    return images;
  };
  const noise = noiseOf(denoise.seed++, ENDS, network.size), betas = network.betas.slice(0, t + 1);
  const known = mask && { x0: repeat(drawing()), mask: repeat(mask) };
  // eta = 1 is Algorithm 2 with the small variance; in few steps, the large one leaves grain
  const options = { eta: 1, xT: repeat(addNoise()), steps: Math.min(END_STEPS, t + 1), known };
  const what = `Four ${mask ? "completions" : "results"} from t = ${t}`;
  await reverse(what, modelOf($("end-class").value, ENDS, 0), noise, betas, options, ({ x0 }) => {
    show($("ends"), toPixels(x0), 2);
  });
}
denoise.seed = 0;

// ---- 5. the network

/**
 * Open a model.onnx when what is running has stopped; keep the one before if that fails.
 * keepsRecording: whether the network is the one of the recording.
 */
async function open(name, bytes, keepsRecording = false) {
  opening = true;
  updateControls();
  say(`Loading ${name} …`);
  stop();
  await run?.ended;
  try {
    const opened = await Network.open(bytes, ...RUNTIMES);
    network?.close();
    network = Object.assign(opened, { name });
    $("refused").textContent = "";
  } catch (error) {
    const message = error.message.split("\n")[0];
    say(/import/i.test(message)
      ? `onnxruntime-web could not be loaded. Sections 1 and 2 work in full without it. For the others, connect and reload; to use them offline later, install a copy: npm install --no-save --no-package-lock --prefix page ${RUNTIME}`
      : $("refused").textContent = `${name} is not a model from export.py that this browser can run: ${message}.`
        + (network ? ` ${network.name} still draws.` : ""), true);
    return false;
  } finally {
    opening = false;
    updateControls();
  }
  const [channels, height, width] = network.shape, { metadata, betas, variance, device } = network;
  const about = {
    file: `${name}, ${(bytes.length / 1e6).toFixed(1)} MB`,
    images: `${width}×${height}, ${channels === 1 ? "grey" : "colour"}`,
    "noise levels": `T = ${betas.length}, β from ${betas[0].toPrecision(2)} to ${betas.at(-1).toPrecision(2)}`,
    variance,
    ...(network.classes.length && { classes: network.classes.length }),
    trained: `${Number(metadata["ddpm.step"] ?? 0).toLocaleString("en")} steps`,
    "made by": metadata["ddpm.source"] ?? "unknown",
  };
  $("about").replaceChildren(...Object.entries(about).map(([term, value]) => {
    const entry = document.createElement("div");
    for (const [tag, text] of [["dt", term], ["dd", value]]) {
      entry.append(Object.assign(document.createElement(tag), { textContent: text }));
    }
    return entry;
  }));
  if (!keepsRecording) {
    [runs, frames] = [[], []];
    for (const canvas of [$("noise"), $("grid")]) show(canvas, new Uint8Array(16 * network.size).fill(128), 4);
    $("comparison").hidden = true;
  }
  offerClasses();
  drawn = noiseOf(1, 1, network.size)();
  $("t").max = betas.length - 1;
  $("number-device").textContent = device;
  show($("ends"), new Uint8Array(ENDS * network.size).fill(128), 2);
  drawShirt();
  updateControls();
  say(`Ready. ${name} runs on ${device}${network.noWebGPU ? ` (${network.noWebGPU})` : ""}.`);
  return true;
}

async function openFile(file) {
  if (file) await open(file.name, new Uint8Array(await file.arrayBuffer()));
}

async function openShipped() {
  try {
    const response = await fetch(SHIPPED);
    if (!response.ok) throw new Error(`the server says ${response.status}`);
    return await open(SHIPPED, new Uint8Array(await response.arrayBuffer()), true);
  } catch (error) {
    say(`${SHIPPED} can't be loaded (${error.message}). Choose a model.onnx below.`, true);
    return false;
  }
}

// ---- the recording

/** Read what was recorded: a row of 16 x_t and 16 x0_hat for each frame. */
async function loadRecording() {
  const response = await fetch(RECORDED.file);
  if (!response.ok) return;
  const bitmap = await createImageBitmap(await response.blob()), { betas, size } = RECORDED;
  const context = new OffscreenCanvas(bitmap.width, bitmap.height)
    .getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const recorded = Array.from({ length: RECORDED.frames }, (_, row) => {
    const t = Math.max(0, 999 - 40 * row), [x, x0] = [0, 16].map((first) => {
      const pixels = new Uint8ClampedArray(16 * size);
      for (let k = 0; k < 16; k++) {
        const { data } = context.getImageData(32 * (first + k), 32 * row, 32, 32);
        for (let at = 0; at < size; at++) pixels[k * size + at] = data[4 * at];
      }
      return pixels;
    });
    return { t, sigma: t ? Math.sqrt(betas[t]) : 0, x, x0 };
  });
  if (frames.length || run || opening && network) return; // somebody was faster
  frames = recorded;
  runs = [{ name: "Algorithm 2, 1000 steps, all in turn (recorded)", seed: 0, count: 16, frames }];
  $("step").max = frames.length - 1;
  $("step").value = frames.length - 1;
  updateControls();
  showFrame();
  await playOnce(recorded);
}

/** Show x_t of the recording from noise to images, once, at the top of the page. */
async function playOnce(recorded) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  for (const { x } of still ? recorded.slice(-1) : recorded) {
    show($("hero"), x, 4);
    await new Promise((resolve) => setTimeout(resolve, 160));
  }
  show($("hero"), recorded.at(-1).x0, 4);
}

// ---- events

$("sample").onclick = sample;
$("class").onchange = $("w").onchange = sampleAgain;
$("other").onchange = showFrame;
const changesOf = offerChanges($("image-changes"), "image-", TEXTS, sampleAgain);
$("w").oninput = () => { $("w-value").textContent = $("w").value; };
$("stop").onclick = stop;
$("step").oninput = showFrame;
$("denoise").onclick = denoise;
$("t").oninput = () => network && addNoise();
$("clear").onclick = () => network && fill($("colour").value);
$("brush").onchange = ({ target }) => {
  if (target.value !== "mask" || !network) return;
  $("t").value = $("t").max; // nothing of what is marked is kept
  addNoise();
};
$("unmark").onclick = () => network && clearMask();
$("take").onclick = takeSample;
$("image-file").onchange = async ({ target }) => {
  if (network && target.files[0]) await useImage(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
};
$("model").onchange = ({ target }) => openFile(target.files[0]).then(() => { target.value = ""; });

const canvasPlace = ({ offsetX, offsetY }) =>
  [(offsetX * $("draw").width) / $("draw").clientWidth, (offsetY * $("draw").height) / $("draw").clientHeight];
$("draw").onpointerdown = (event) => {
  if (!network) return;
  $("draw").setPointerCapture(event.pointerId);
  brush = null;
  paint(...canvasPlace(event));
};
$("draw").onpointermove = (event) => {
  if (network && $("draw").hasPointerCapture(event.pointerId)) paint(...canvasPlace(event));
};
$("draw").onkeydown = (event) => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!network || !(move || event.key === " ")) return;
  event.preventDefault();
  const { width, height } = $("draw"), [x, y] = brush ?? [width / 2, height / 2];
  const within = (value, size) => Math.min(size - 0.5, Math.max(0.5, value));
  if (move) brush = [within(x + move[0], width), within(y + move[1], height)];
  if (!move || event.shiftKey) paint(...brush ?? [x, y]);
};
addEventListener("keydown", (event) => event.key === "Escape" && stop());

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (file?.type.startsWith("image/") && network) useImage(file);
  else openFile(file);
});

startPlane();
startLearning();
window.recorded = loadRecording();
window.ready = openShipped();
