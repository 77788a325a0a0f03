// The page: its sections, the recording, and section 5, the choice of the network.

import { $ } from "./common.js";
import { startArrows } from "./arrows.js";
import { beginDrawing, startDrawing, useImage } from "./drawing.js";
import { setOpening, showRecorded, startImages, useClasses } from "./images.js";
import { startLearning } from "./learn.js";
import { Network } from "./network.js";
import { network, tell, useNetwork, work } from "./reverse.js";
import { BETAS } from "./sampler.js";
import * as scene from "./scene.js";

const SHIPPED = "fashion-mnist.onnx", RUNTIME = "onnxruntime-web@1.30.0";
// Where it is: beside the page, for use without a connection, or else on jsDelivr.
const RUNTIMES = ["node_modules/onnxruntime-web", `https://cdn.jsdelivr.net/npm/${RUNTIME}`]
  .map((folder) => new URL(`${folder}/dist/ort.webgpu.bundle.min.mjs`, import.meta.url).href);
// What docs/make_figures.py has recorded: 16 samples of Algorithm 2 in 1000 steps, of seed 0.
const RECORDED = "recorded.png", FRAMES = 26, SIZE = 1024;
const ALL = ["status", "draw-status", "own-status"];

// A link to the lesson works only on GitHub Pages, where the repository's address is known.
const [, owner] = location.hostname.match(/^(.+)\.github\.io$/) ?? [];
for (const link of document.querySelectorAll("[data-lesson]")) {
  const repository = location.pathname.split("/")[1];
  const lesson = `https://github.com/${owner}/${repository}/blob/HEAD/docs/lesson.md`;
  if (owner) link.href = `${lesson}#${link.dataset.lesson}`;
}

let opening = 0; // how many are being opened

/**
 * Open a model.onnx when what is running has stopped; keep the one before if that fails.
 * keeps: whether the network is the one of the recording.
 */
async function open(name, bytes, keeps = false) {
  const mine = ++opening;
  setOpening(true);
  tell(ALL, `Loading ${name} …`);
  await work.stop();
  let opened;
  try {
    tell(ALL, `Loading ${name} …`);
    opened = Object.assign(await Network.open(bytes, ...RUNTIMES), { name });
  } catch (error) {
    const message = error.message.split("\n")[0];
    tell(ALL, /import/i.test(message)
      ? `onnxruntime-web could not be loaded. Sections 1 and 2 work in full without it. For the others, connect and reload; to use them offline later, install a copy: npm install --no-save --no-package-lock --prefix page ${RUNTIME}`
      : `${name} is not a model from export.py that this browser can run: ${message}.`
        + (network ? ` ${network.name} still draws.` : ""), { isError: true });
    return false;
  } finally {
    if (mine === opening) setOpening(false);
  }
  if (mine !== opening) { // another one was chosen
    opened.close();
    return false;
  }
  network?.close();
  useNetwork(opened);
  useClasses(opened, keeps);
  beginDrawing(opened);
  scene.useNetwork(opened);
  for (const element of document.querySelectorAll(".classes")) element.hidden = !opened.classes.length;
  $("about").textContent = about(opened, bytes.length);
  tell(["status", "draw-status"], "Ready.");
  tell(["own-status"], `Ready. ${name} runs on ${opened.device}${opened.noWebGPU ? ` (${opened.noWebGPU})` : ""}.`);
  return true;
}

/** Say what the file is. */
function about({ name, shape: [channels, height, width], betas, variance, classes, metadata }, size) {
  return `${name} has ${(size / 1e6).toFixed(1)} MB. It draws images of ${width}×${height} pixels, ${channels === 1 ? "grey" : "colour"}`
    + `${classes.length ? `, of ${classes.length} classes` : ""}. It knows ${betas.length} noise levels, β from ${betas[0].toPrecision(2)} to `
    + `${betas.at(-1).toPrecision(2)}, and the ${variance} variance. It was trained for ${Number(metadata["ddpm.step"] ?? 0).toLocaleString("en")} `
    + `steps (${metadata["ddpm.source"] ?? "source unknown"}).`;
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
    tell(ALL, `${SHIPPED} can't be loaded (${error.message}). Choose a model.onnx below.`, { isError: true });
    return false;
  }
}

/** Read what was recorded: a row of 16 x_t and 16 x0_hat for each frame. The page works without. */
async function loadRecording() {
  const response = await fetch(RECORDED).catch(() => null);
  if (!response?.ok) return;
  const bitmap = await createImageBitmap(await response.blob());
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const recorded = Array.from({ length: FRAMES }, (_, row) => {
    const t = Math.max(0, 999 - 40 * row), [x, x0] = [0, 16].map((first) => {
      const pixels = new Uint8ClampedArray(16 * SIZE);
      for (let k = 0; k < 16; k++) {
        const { data } = context.getImageData(32 * (first + k), 32 * row, 32, 32);
        for (let at = 0; at < SIZE; at++) pixels[k * SIZE + at] = data[4 * at];
      }
      return pixels;
    });
    return { t, sigma: t ? Math.sqrt(BETAS[t]) : 0, x, x0 };
  });
  scene.useRecording(recorded);
  if (!network || network.name === SHIPPED) showRecorded(recorded);
}

$("model").onchange = ({ target }) => openFile(target.files[0]).then(() => { target.value = ""; });
addEventListener("keydown", (event) => event.key === "Escape" && work.stop());
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

scene.startScene();
startArrows();
startLearning();
startImages();
startDrawing();
window.recorded = loadRecording().catch(() => {});
window.ready = openShipped();
