// eps_theta(x_t, t) from a model.onnx of export.py, computed by ONNX Runtime in a worker.
// Images are Float32Array, in the order (B, C, H, W).

/** The metadata_props of a ModelProto (its field 14) as an object of strings. */
export function readMetadata(bytes) {
  const props = {}, text = new TextDecoder();
  for (const [field, prop] of fields(bytes)) {
    if (field !== 14) continue;
    const { 1: key, 2: value } = Object.fromEntries(fields(prop));
    props[text.decode(key)] = text.decode(value ?? new Uint8Array());
  }
  return props;
}

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

/**
 * eps_theta(x_t, t) from the bytes of a model.onnx, computed in a worker.
 *
 *     const network = await Network.open(bytes, "https://.../ort.webgpu.bundle.min.mjs");
 *     const eps = await network.eps(x, t); // for any whole number of images
 *
 * runtime is the address of onnxruntime-web; if it cannot be loaded from there, fallback is tried.
 * betas, variance, shape ([C, H, W]) and classes (their names, [] if there are none) are the file's;
 * metadata is all that it says about itself.
 * device says what the network runs on.
 */
export class Network {
  static async open(bytes, runtime, fallback = runtime) {
    const network = new Network();
    network.#read(bytes);
    network.#worker = new Worker(import.meta.url, { type: "module" });
    network.#worker.onmessage = ({ data }) => network.#answer(data);
    network.#worker.onerror = (event) => {
      event.preventDefault();
      network.#answer({ error: event.message ?? "the worker did not start" });
    };
    try {
      const { shape, classes, betas: { length: T }, metadata } = network;
      const values = JSON.parse(metadata["ddpm.eps_of_example"] ?? "[]");
      return Object.assign(network, await network.#ask({ bytes, runtime, fallback, shape, classes, T, values }));
    } catch (error) {
      network.close();
      throw error;
    }
  }

  #worker;
  #waiting = []; // [resolve, reject] of each question, in order

  #read(bytes) {
    this.metadata = readMetadata(bytes);
    const names = ["ddpm.betas", "ddpm.variance", "ddpm.image_shape"];
    const missing = names.filter((name) => !(name in this.metadata));
    if (missing.length) throw new Error(`its metadata lacks ${missing.join(", ")}`);
    [this.betas, this.shape] = [JSON.parse(this.metadata[names[0]]), JSON.parse(this.metadata[names[2]])];
    this.variance = this.metadata[names[1]];
    this.classes = JSON.parse(this.metadata["ddpm.classes"] ?? "[]");
    this.size = this.shape[0] * this.shape[1] * this.shape[2];
  }

  #ask(question) {
    return new Promise((...callbacks) => {
      if (!this.#worker) throw new Error("the network was closed");
      this.#waiting.push(callbacks);
      this.#worker.postMessage(question);
    });
  }

  #answer(data) {
    const [resolve, reject] = this.#waiting.shift() ?? [];
    if (data.error) reject?.(new Error(data.error));
    else resolve?.(data);
  }

  /** x: Float32Array of B images. t: an integer. y: B classes, by default "no class". The result is shaped like x. */
  async eps(x, t, y) {
    const { eps } = await this.#ask({ x, t, y });
    return eps;
  }

  /** Free the memory; calls that wait for an answer fail. */
  close() {
    this.#worker?.terminate();
    this.#worker = null;
    while (this.#waiting.length) this.#answer({ error: "the network was closed" });
  }
}

// ---- in the worker

let ort, session, shape, classes;

/** Compare the eps of an example with the answer in the file, as sample.py does on CUDA. */
async function check(T, values) {
  const size = shape[0] * shape[1] * shape[2];
  const x = Float32Array.from({ length: size }, (_, k) => Math.SQRT2 * Math.sin(k));
  const answer = await eps({ x, t: Math.floor(T / 2) }), apart = Math.ceil(size / 64);
  const error = Math.hypot(...values.map((value, k) => answer.eps[k * apart] - value)) / Math.hypot(...values);
  if (values.length && !(error < 0.05)) {
    throw new Error(`it computes an eps that is wrong by ${(100 * error).toFixed(0)} %`);
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
  const feeds = { x_t: new ort.Tensor("float32", x, [batch, ...shape]), t: integers(Array(batch).fill(t)) };
  if (classes.length) feeds.y = integers(y ?? Array(batch).fill(classes.length));
  const results = await session.run(feeds), result = await results.eps.getData();
  if (!result.every(Number.isFinite)) throw new Error(`eps is not finite at t = ${t}`);
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
