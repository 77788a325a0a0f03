// The page: its sections, and section 5, the choice of the network.

import { $, pause } from "./common.js";
import { startArrows } from "./arrows.js";
import { beginDrawing, startDrawing } from "./drawing.js";
import { beginImages, startImages } from "./images.js";
import { startLearning } from "./learn.js";
import { Network } from "./network.js";
import { network, tell, useNetwork, work } from "./reverse.js";
import * as scene from "./opening.js";

const SHIPPED = "fashion-mnist.onnx", RUNTIME = "onnxruntime-web@1.30.0";
// Where it is: beside the page, for use without a connection, or else on jsDelivr.
const RUNTIMES = ["node_modules/onnxruntime-web", `https://cdn.jsdelivr.net/npm/${RUNTIME}`]
  .map((folder) => new URL(`${folder}/dist/ort.webgpu.bundle.min.mjs`, import.meta.url).href);
const ALL = ["status", "draw-status", "own-status"];

// A link to the lesson works only on GitHub Pages, where the repository's address is known.
const [, owner] = location.hostname.match(/^(.+)\.github\.io$/) ?? [];
for (const link of owner ? document.querySelectorAll("[data-lesson]") : []) {
  const repository = location.pathname.split("/")[1];
  link.href = `https://github.com/${owner}/${repository}/blob/HEAD/docs/lesson.md#${link.dataset.lesson}`;
}

let chosen = 0; // how many networks were chosen

/** Open a model.onnx when what is running has stopped; keep the one before if that fails. */
async function open(name, bytes) {
  const mine = ++chosen;
  await work.stop();
  tell(network ? ["own-status"] : ALL, `Loading ${name} …`);
  let opened;
  try {
    opened = Object.assign(await Network.open(bytes, ...RUNTIMES), { name });
  } catch (error) {
    const message = error.message.split("\n")[0];
    return tell(network ? ["own-status"] : ALL, /import/i.test(message)
      ? `onnxruntime-web could not be loaded. Sections 1 and 2 work in full without it. For the others, connect and reload; to use them offline later, install a copy: npm install --no-save --no-package-lock --prefix page ${RUNTIME}`
      : `${name} is not a model from export.py that this browser can run: ${message}.`
        + (network ? ` ${network.name} still draws.` : ""), { isError: true });
  }
  await work.stop(); // what the reader has started meanwhile
  if (mine !== chosen) return opened.close(); // another one was chosen
  await scene.useNetwork(null);
  network?.close();
  useNetwork(opened);
  beginDrawing(opened);
  beginImages(opened);
  scene.useNetwork(opened);
  for (const element of document.querySelectorAll(".classes")) element.hidden = !opened.classes.length;
  tell(["status", "draw-status"], "Ready.");
  const { device, noWebGPU } = opened;
  tell(["own-status"], `Ready. ${name} runs on ${device}${noWebGPU ? ` (${noWebGPU})` : ""}.`);
}

const openFile = async (file) => file && open(file.name, new Uint8Array(await file.arrayBuffer()));

async function openShipped() {
  const response = await fetch(SHIPPED).catch(() => null);
  const content = response?.ok && await response.arrayBuffer().catch(() => null); // the connection may break
  if (content) await open(SHIPPED, new Uint8Array(content));
  else tell(ALL, `${SHIPPED} can't be loaded. Reload the page, or choose a model.onnx below.`, { isError: true });
  return network !== null;
}

$("model").onchange = ({ target }) => openFile(target.files[0]).then(() => { target.value = ""; });
addEventListener("keydown", (event) => event.key === "Escape" && work.stop());

/** Start the sections, one at a time, so that the scene can move; then open the included network. */
async function begin() {
  for (const start of [startArrows, startLearning, startImages, startDrawing]) {
    await pause(0);
    start();
  }
  return openShipped();
}

window.recorded = scene.startScene();
window.ready = begin();
