// eps_theta(x_t, t) from a model.onnx of export.py, computed by ONNX Runtime in a worker.
// Images are Float32Array, in the order (B, C, H, W).

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

/**
 * Open a model.onnx, and compute it in a worker.
 *
 *     const network = await open(bytes, "https://.../ort.webgpu.bundle.min.mjs");
 *     const eps = await network.eps(x, t); // for any whole number of images
 *
 * runtime is the address of onnxruntime-web; if it cannot be loaded from there, fallback is tried.
 * The network has betas, shape ([C, H, W]) and classes (their names, [] if there are none) of the
 * file, and the device that it runs on. eps(x, t, y): by default, y is "no class" for each image.
 * close() frees the memory; calls that wait for an answer fail.
 */
export async function open(bytes, runtime, fallback = runtime) {
  const read = metadataOf(bytes), betas = read("betas"), shape = read("image_shape");
  const classes = read("classes", []), values = read("eps_of_example", []);
  const worker = new Worker(import.meta.url, { type: "module" });
  const waiting = []; // [resolve, reject] of each question, in order
  let isClosed = false;
  const answer = (data) => {
    const [resolve, reject] = waiting.shift() ?? [];
    if (data.error) reject?.(new Error(data.error));
    else resolve?.(data);
  };
  worker.onmessage = ({ data }) => answer(data);
  worker.onerror = (event) => {
    event.preventDefault();
    answer({ error: event.message ?? "the worker did not start" });
  };
  const ask = (question) => new Promise((...callbacks) => {
    if (isClosed) throw new Error("the network was closed");
    waiting.push(callbacks);
    worker.postMessage(question);
  });
  const close = () => {
    isClosed = true;
    worker.terminate();
    while (waiting.length) answer({ error: "the network was closed" });
  };
  const eps = async (x, t, y) => (await ask({ x, t, y })).eps;
  try {
    const file = { shape, classes, T: betas.length, values };
    const { device } = await ask({ bytes, runtime, fallback, ...file });
    return { betas, shape, classes, size: shape[0] * shape[1] * shape[2], device, eps, close };
  } catch (error) {
    close();
    throw error;
  }
}

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

async function start({ bytes, runtime, fallback, T, values, ...file }) {
  ort = await import(runtime).catch(() => import(fallback));
  ({ shape, classes } = file);
  ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  const create = async (provider) => {
    const options = { executionProviders: [provider], logSeverityLevel: 4 }; // errors are thrown
    session = await ort.InferenceSession.create(bytes, options);
    await check(T, values);
  };
  if (await navigator.gpu?.requestAdapter().catch(() => null)) {
    try {
      await create("webgpu");
      return { device: "WebGPU" };
    } catch (error) {
      console.warn(`WebGPU fails: ${error.message}`);
    }
  }
  await create("wasm");
  return { device: "WebAssembly" };
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
