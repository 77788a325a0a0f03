// The networks of the page: the included ones, opened when they are first needed, and the reader's.

import * as file from "./network.js";

const RUNTIME = "onnxruntime-web@1.30.0";
// Where it is: beside the page, for use without a connection, or else on jsDelivr.
const RUNTIMES = ["node_modules/onnxruntime-web", `https://cdn.jsdelivr.net/npm/${RUNTIME}`]
  .map((folder) => new URL(`${folder}/dist/ort.webgpu.bundle.min.mjs`, import.meta.url).href);
const FILES = { clothes: "fashion-mnist.onnx", emoji: "emoji.onnx" };
const KINDS = { emoji: ["smileys", "people", "flags"] }; // the classes that are drawn
const LOST = "The network could not be loaded. Connect to the internet, and reload the page. "
  + "The opening and sections 1 and 2 work without it.";
const opened = {}; // promises

/** Open a model.onnx. Fails with a sentence for the reader. */
export async function open(name, bytes) {
  try {
    return Object.assign(await file.open(bytes, ...RUNTIMES), { name });
  } catch (error) {
    const message = error.message.split("\n")[0], what = "is not a model from export.py";
    const isLost = /import/i.test(message); // of ONNX Runtime
    throw new Error(isLost ? LOST : `${name} ${what} that this browser can run: ${message}.`);
  }
}

async function download(name) {
  const read = (response) => (response.ok ? response.arrayBuffer() : null);
  const content = await fetch(name).then(read).catch(() => null); // the connection may break
  if (!content) throw new Error(LOST);
  return open(name, new Uint8Array(content));
}

/** The promise of the network "clothes" or "emoji". kinds: the indices of the classes to draw. */
export const included = (name) => (opened[name] ??= download(FILES[name]).then((network) =>
  Object.assign(network, { kinds: KINDS[name]?.map((kind) => network.classes.indexOf(kind)) })));
