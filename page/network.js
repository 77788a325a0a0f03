// eps_theta(x_t, t) from a model.onnx by export.py, which worker.js computes.
// Images are Float32Array, in the order (B, C, H, W).

const RUNTIME = "onnxruntime-web@1.30.0";
// Where it is: beside the page, for use without a connection, or else on jsDelivr.
const FOLDERS = ["node_modules/onnxruntime-web", `https://cdn.jsdelivr.net/npm/${RUNTIME}`]
  .map((folder) => new URL(`${folder}/dist/`, import.meta.url).href);
const FILES = { clothes: "fashion-mnist.onnx", emoji: "emoji.onnx" };
const KINDS = { emoji: ["face-concerned", "person-role", "country-flag"] }; // classes to draw
const LOST = "The network could not be loaded. Connect to the internet, and reload the page. "
  + "Sections 1 and 2, and the opening from full noise, work without it.";
const opened = {}; // promises of the included networks

/** What the file says about itself: the JSON value of a key in its metadata_props, or a default.
 * In a protobuf, a string is a tag, its length in digits of 7 bits, and its bytes. */
function metadataOf(bytes) {
  const text = new TextDecoder("latin1").decode(bytes);
  return (name, otherwise) => {
    let at = text.lastIndexOf(`ddpm.${name}\x12`), length = 0, scale = 1, digit = 128;
    if (at < 0 && otherwise === undefined) throw new Error(`its metadata lacks ddpm.${name}`);
    if (at < 0) return otherwise;
    for (at += name.length + 6; digit >= 128; at++, scale *= 128) {
      digit = bytes[at];
      length += (digit % 128) * scale;
    }
    return JSON.parse(text.slice(at, at + length));
  };
}

const waiting = []; // [resolve, reject] of each question to the worker, in order
let worker = null, count = 0; // one worker has all models, by their numbers

/** Ask the worker, which is started if there is none. */
function ask(question) {
  worker ??= begin();
  return new Promise((...callbacks) => {
    waiting.push(callbacks);
    worker.postMessage(question);
  });
}

function begin() {
  const its = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  its.onmessage = ({ data }) => {
    const [resolve, reject] = waiting.shift();
    if (data.error === undefined) resolve(data);
    else reject(new Error(data.error || LOST));
  };
  its.onerror = () => { // it could not be loaded
    worker = null;
    for (const [, reject] of waiting.splice(0)) reject(new Error(LOST));
  };
  return its;
}

/** Open a model.onnx, which is computed in a worker. Fails with a sentence for the reader.
 * The network has betas, shape ([C, H, W]) and classes (their names, [] if there are none) of the
 * file. eps(x, t, y), for any whole number of images, is a promise; by default, y is "no class" for
 * each image. close() frees the memory. */
export async function open(name, bytes) {
  const number = count++, close = () => ask({ number });
  try {
    const read = metadataOf(bytes), betas = read("betas"), shape = read("image_shape");
    const classes = read("classes", []), values = read("eps_of_example", []);
    const T = betas.length;
    await ask({ number, bytes, folders: FOLDERS, shape, classes, T, values });
    const eps = async (x, t, y) => (await ask({ number, x, t, y })).eps;
    return { betas, shape, classes, close, eps };
  } catch ({ message }) {
    if (message === LOST) throw new Error(LOST);
    close();
    throw new Error(`${name} is not a model from export.py that this browser can run: ${message}.`);
  }
}

async function download(name) {
  const read = (response) => (response.ok ? response.arrayBuffer() : null);
  const content = await fetch(FILES[name]).then(read).catch(() => null); // the connection may break
  if (!content) throw new Error(LOST);
  const network = await open(FILES[name], new Uint8Array(content));
  return { ...network, kinds: KINDS[name]?.map((kind) => network.classes.indexOf(kind)) };
}

/** The network "clothes" or "emoji", opened when it is first needed, or again after a failure.
 * kinds: of classes to draw. */
export const included = (name) => (opened[name] ??= download(name).catch((error) => {
  delete opened[name];
  throw error;
}));
