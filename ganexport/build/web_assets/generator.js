// Runs a generator in the browser, through onnxruntime-web's WebAssembly backend.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { latents } from "./seeding.js";

// More threads need a cross-origin isolated page; one works from any file server.
ort.env.wasm.numThreads = 1;

export class Generator {
  static async load(base = ".") {
    const [spec, model] = await Promise.all([
      fetch(`${base}/spec.json`).then((response) => response.json()),
      fetch(`${base}/generator.onnx`).then((response) => response.arrayBuffer()),
    ]);
    return new Generator(spec, await ort.InferenceSession.create(new Uint8Array(model)));
  }

  constructor(spec, session) { this.spec = spec; this.session = session; }

  get classes() {
    const input = this.spec.inputs.find(({ sampler }) => sampler.type === "label" || sampler.type === "onehot");
    return input ? input.sampler.classes : null;
  }

  get truncates() {
    return this.spec.inputs.some(({ name, sampler }) => name === "truncation" || sampler.type === "normal");
  }

  // The picture of sample `start` of `seed` (BigInt), as ImageData.
  async picture(seed, { start = 0n, label = null, truncation = null } = {}) {
    const batch = this.spec.dims.find((dim) => dim.name === "batch");
    // The smallest batch that the generator takes; only its first picture is used.
    const drawn = latents(this.spec, { seed, start, count: batch.min, label, truncation });
    const feeds = Object.fromEntries(
      Object.entries(drawn).map(([name, { data, dims, type }]) => [name, new ort.Tensor(type, data, dims)]));
    const output = this.spec.outputs.find(({ layout, shape }) =>
      ["NCHW", "NHWC"].includes(layout) && [1, 3, 4].includes(shape[layout.indexOf("C")]));
    const tensor = (await this.session.run(feeds))[output.name];
    return toPicture(tensor, output);
  }
}

// Value `low` of the declared range is 0, `high` is 255, rounded half up, in binary32 like Python's.
function toPicture(tensor, { layout, range, dtype }) {
  const [height, width, channels] = ["H", "W", "C"].map((axis) => tensor.dims[layout.indexOf(axis)]);
  const plane = height * width, planar = layout === "NCHW";
  const scale = dtype === "uint8" ? 1 : Math.fround(255 / (range[1] - range[0]));
  const offset = dtype === "uint8" ? 0 : Math.fround(0.5 - range[0] * (255 / (range[1] - range[0])));
  const at = (pixel, channel) => {
    const value = tensor.data[planar ? channel * plane + pixel : pixel * channels + channel];
    return Math.max(0, Math.min(255, Math.trunc(Math.fround(Math.fround(value * scale) + offset))));
  };
  const pixels = new Uint8ClampedArray(plane * 4);
  for (let pixel = 0; pixel < plane; pixel++) {
    for (let channel = 0; channel < 3; channel++) pixels[pixel * 4 + channel] = at(pixel, channels === 1 ? 0 : channel);
    pixels[pixel * 4 + 3] = channels === 4 ? at(pixel, 3) : 255;
  }
  return new ImageData(pixels, width, height);
}
