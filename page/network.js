// eps_theta(x_t, t) from a model.onnx of export.py, computed by ONNX Runtime in a worker.
// Images are Float32Array, in the order (B, C, H, W).

/** The fields of a protobuf message: [number, bytes], bytes being undefined for a plain number. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1;
    for (;;) {
      if (at >= bytes.length || scale > 2 ** 63) throw new Error("it is not an ONNX file");
      const byte = bytes[at++];
      value += (byte & 127) * scale; // a shift would overflow 32 bits
      scale *= 128;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint(), type = tag % 8;
    let content;
    if (type === 0) varint();
    else if (type === 1) at += 8;
    else if (type === 5) at += 4;
    else if (type === 2) {
      const length = varint();
      content = bytes.subarray(at, (at += length));
    } else throw new Error("it is not an ONNX file");
    if (at > bytes.length) throw new Error("it is cut off");
    yield [Math.floor(tag / 8), content];
  }
}

/** The metadata_props of a ModelProto (its field 14) as an object of strings. */
function readMetadata(bytes) {
  const props = {}, text = new TextDecoder();
  for (const [field, prop] of fields(bytes)) {
    if (field !== 14) continue;
    const { 1: key, 2: value } = Object.fromEntries(fields(prop));
    props[text.decode(key)] = text.decode(value ?? new Uint8Array());
  }
  const missing = ["ddpm.betas", "ddpm.image_shape"].filter((name) => !(name in props));
  if (missing.length) throw new Error(`its metadata lacks ${missing.join(", ")}`);
  return props;
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
  const metadata = readMetadata(bytes), read = (name) => JSON.parse(metadata[`ddpm.${name}`] ?? "[]");
  const betas = read("betas"), shape = read("image_shape"), classes = read("classes");
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
  const file = { shape, classes, T: betas.length, values: read("eps_of_example") };
  try {
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
    const options = { executionProviders: [provider], logSeverityLevel: 4 }; // the errors are thrown
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
