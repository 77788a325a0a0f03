// eps_theta(x_t, t) from a model.onnx by export.py, computed by ONNX Runtime in a worker.
// Images are Float32Array, in the order (B, C, H, W).

const RUNTIME = "onnxruntime-web@1.30.0";
// Where it is: beside the page, for use without a connection, or else on jsDelivr.
const RUNTIMES = ["node_modules/onnxruntime-web", `https://cdn.jsdelivr.net/npm/${RUNTIME}`]
  .map((folder) => new URL(`${folder}/dist/`, import.meta.url).href);
const FILES = { clothes: "fashion-mnist.onnx", emoji: "emoji.onnx" };
const KINDS = { emoji: ["smileys", "people", "flags"] }; // the classes that are drawn
const LOST = "The network could not be loaded. Connect to the internet, and reload the page. "
  + "The opening and sections 1 and 2 work offline.";
const opened = {}; // promises

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

/** Open a model.onnx, and compute it in a worker. Fails with a sentence for the reader.
 * The network has betas, shape ([C, H, W]) and classes (their names, [] if there are none) of the
 * file, and the device that it runs on. eps(x, t, y), for any whole number of images, is a promise;
 * by default, y is "no class" for each image. close() frees the memory; what was asked before is
 * not answered any more. */
export async function open(name, bytes) {
  const worker = new Worker(import.meta.url, { type: "module" });
  const waiting = []; // [resolve, reject] of each question, in order
  worker.onmessage = ({ data }) => {
    const [resolve, reject] = waiting.shift();
    return data.error ? reject(new Error(data.error)) : resolve(data);
  };
  worker.onerror = () => { // it could not be loaded
    for (const [, reject] of waiting.splice(0)) reject(new Error(LOST));
  };
  const ask = (question) => new Promise((...callbacks) => {
    waiting.push(callbacks);
    worker.postMessage(question);
  });
  const close = () => worker.terminate();
  const eps = async (x, t, y) => (await ask({ x, t, y })).eps;
  try {
    const read = metadataOf(bytes), betas = read("betas"), shape = read("image_shape");
    const classes = read("classes", []), values = read("eps_of_example", []);
    const { device } = await ask({ bytes, shape, classes, T: betas.length, values });
    const size = shape[0] * shape[1] * shape[2];
    return { name, betas, shape, classes, size, device, eps, close };
  } catch (error) {
    close();
    const [message] = error.message.split("\n"), what = "is not a model from export.py";
    if (message === LOST) throw error;
    throw new Error(`${name} ${what} that this browser can run: ${message}.`);
  }
}

async function download(name) {
  const read = (response) => (response.ok ? response.arrayBuffer() : null);
  const content = await fetch(FILES[name]).then(read).catch(() => null); // the connection may break
  if (!content) throw new Error(LOST);
  const network = await open(FILES[name], new Uint8Array(content));
  return { ...network, kinds: KINDS[name]?.map((kind) => network.classes.indexOf(kind)) };
}

/** The network "clothes" or "emoji", opened when it is first needed. kinds: of classes to draw. */
export const included = (name) => (opened[name] ??= download(name));

// ---- in the worker

let ort, session, shape, classes;

/** Compare the eps of an example with the answer in the file, as sample.py does on CUDA. */
async function check(T, values) {
  const size = shape[0] * shape[1] * shape[2];
  const x = Float32Array.from({ length: size }, (_, k) => Math.SQRT2 * Math.sin(k));
  const answer = await eps({ x, t: Math.floor(T / 2) }), apart = Math.ceil(size / 64);
  const wrong = Math.hypot(...values.map((value, k) => answer.eps[k * apart] - value));
  const error = (100 * wrong) / Math.hypot(...values);
  if (values.length && !(error < 5)) {
    throw new Error(`it computes an eps that is wrong by ${error.toFixed(0)} %`);
  }
}

async function start({ bytes, T, values, ...file }) {
  ({ shape, classes } = file);
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const build = adapter ? "webgpu" : "wasm"; // that with WebGPU is twice as large
  const load = (folder) => import(`${folder}ort.${build}.bundle.min.mjs`);
  const lose = () => { throw new Error(LOST); };
  ort = await load(RUNTIMES[0]).catch(() => load(RUNTIMES[1])).catch(lose);
  ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  const create = async (provider) => {
    const options = { executionProviders: [provider], logSeverityLevel: 4 }; // errors are thrown
    session = await ort.InferenceSession.create(bytes, options);
    await check(T, values);
  };
  const warn = (error) => console.warn(`WebGPU fails: ${error.message}`);
  const isOnGpu = adapter && await create("webgpu").then(() => true, warn);
  if (!isOnGpu) await create("wasm");
  return { device: isOnGpu ? "WebGPU" : "WebAssembly" };
}

async function eps({ x, t, y }) {
  const batch = x.length / (shape[0] * shape[1] * shape[2]);
  const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [batch]);
  const x_t = new ort.Tensor("float32", x, [batch, ...shape]);
  const feeds = { x_t, t: integers(Array(batch).fill(t)) };
  if (classes.length) feeds.y = integers(y ?? Array(batch).fill(classes.length));
  const results = await session.run(feeds), result = await results.eps.getData();
  if (!result.every(Number.isFinite)) throw new Error(`eps is not finite at level ${t + 1}`);
  return { eps: result.slice() }; // a copy, because the runtime may use its memory again
}

if (typeof WorkerGlobalScope !== "undefined" && self instanceof WorkerGlobalScope) {
  self.onmessage = async ({ data }) => {
    try {
      self.postMessage(await (data.bytes ? start(data) : eps(data)));
    } catch (error) {
      self.postMessage({ error: String(error?.message ?? error) });
    }
  };
}
