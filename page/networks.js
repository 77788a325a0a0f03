// The networks of the page: the included ones, each opened when it is first needed, and the reader's.

import { Network } from "./network.js";

export const RUNTIME = "onnxruntime-web@1.30.0";
// Where it is: beside the page, for use without a connection, or else on jsDelivr.
const RUNTIMES = ["node_modules/onnxruntime-web", `https://cdn.jsdelivr.net/npm/${RUNTIME}`]
  .map((folder) => new URL(`${folder}/dist/ort.webgpu.bundle.min.mjs`, import.meta.url).href);
const FILES = { clothes: "fashion-mnist.onnx", emoji: "emoji.onnx" };
const KINDS = { emoji: ["smileys", "people", "flags"] }; // the classes that are drawn
const opened = {}; // promises

/** Open a model.onnx. Fails with a sentence for the reader. */
export async function open(name, bytes) {
  try {
    return Object.assign(await Network.open(bytes, ...RUNTIMES), { name });
  } catch (error) {
    const message = error.message.split("\n")[0];
    throw new Error(/import/i.test(message)
      ? `onnxruntime-web could not be loaded. Sections 1 and 2 work in full without it. For the others, connect and reload; to use them offline later, install a copy: npm install --no-save --no-package-lock --prefix page ${RUNTIME}`
      : `${name} is not a model from export.py that this browser can run: ${message}.`);
  }
}

async function download(name) {
  const response = await fetch(name).catch(() => null);
  const content = response?.ok && await response.arrayBuffer().catch(() => null); // the connection may break
  if (!content) throw new Error(`${name} can't be loaded. Reload the page, or choose a model.onnx below.`);
  return open(name, new Uint8Array(content));
}

/** The promise of the network "clothes" or "emoji"; kinds: the indices of the classes that are drawn. */
export const included = (name) => (opened[name] ??= download(FILES[name]).then((network) =>
  Object.assign(network, { kinds: KINDS[name]?.map((kind) => network.classes.indexOf(kind)) })));
