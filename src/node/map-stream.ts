// The body of a streaming /machine/map answer (spec/ts2021-control-protocol.md, section 11):
//
//   u32 LITTLE-endian length | that many bytes, over and over
//
// The bytes are one zstd frame of JSON when the request asked for it, raw JSON otherwise.
import { zstdDecompressSync } from "node:zlib";
import type { MapResponse } from "../wire/tailcfg.ts";

/** Largest frame on the wire. A map of 10,000 peers is about 3 MiB compressed. */
export const MAX_FRAME = 64 * 1024 * 1024;
/** Largest JSON after decompression. */
export const MAX_MESSAGE = 256 * 1024 * 1024;

/** What the server sent is no map stream; the stream ends. */
export class MapStreamError extends Error {
  override name = "MapStreamError";
}

/** Cuts frames out of chunks. Memory is bounded by the frame limit, and grows only with bytes that really came. */
export class MapFrameReader {
  private parts: Uint8Array[] = [];
  private have = 0;

  constructor(private readonly limit = MAX_FRAME) {}

  /** The frames that `chunk` completes. Throws MapStreamError when one claims more than the limit. */
  push(chunk: Uint8Array): Uint8Array[] {
    if (chunk.length > 0) this.parts.push(chunk);
    this.have += chunk.length;
    const frames: Uint8Array[] = [];
    while (this.have >= 4) {
      const length = this.peekLength();
      if (length > this.limit) throw new MapStreamError(`the map stream claims a message of ${length} bytes`);
      if (this.have < 4 + length) break;
      const joined = this.join();
      frames.push(joined.slice(4, 4 + length));
      this.parts = [joined.subarray(4 + length)];
      this.have = joined.length - 4 - length;
    }
    return frames;
  }

  private peekLength(): number {
    let head = this.parts[0]!;
    if (head.length < 4) head = this.join();
    return new DataView(head.buffer, head.byteOffset).getUint32(0, true);
  }

  private join(): Uint8Array {
    const joined = this.parts.length === 1 ? this.parts[0]! : new Uint8Array(Buffer.concat(this.parts));
    this.parts = [joined];
    return joined;
  }
}

/** One frame to one message. Throws MapStreamError. */
export function decodeMapFrame(frame: Uint8Array, compressed: boolean): MapResponse {
  let json: Uint8Array = frame;
  if (compressed) {
    try {
      json = zstdDecompressSync(frame, { maxOutputLength: MAX_MESSAGE });
    } catch (error) {
      throw new MapStreamError(`a message of the map stream does not decompress: ${(error as Error).message}`);
    }
  }
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder().decode(json));
  } catch {
    throw new MapStreamError("a message of the map stream is no JSON");
  }
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new MapStreamError("a message of the map stream is no JSON object");
  return value as MapResponse;
}
