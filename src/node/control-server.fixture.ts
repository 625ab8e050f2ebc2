// A control server for tests, in this process: real TCP, Noise and HTTP/2, with answers that the test gives.
import { createServer as createHttp, type Server as HttpServer } from "node:http";
import { createServer as createHttp2, type Http2Server, type ServerHttp2Stream } from "node:http2";
import type { AddressInfo, Socket } from "node:net";
import { zstdCompressSync } from "node:zlib";
import { formatKey, randomBytes } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import { NoiseDuplex } from "../net/noise-duplex.ts";
import { respondToInitiation } from "../wire/noise.ts";
import type { MapRequest, MapResponse, RegisterRequest, RegisterResponse } from "../wire/tailcfg.ts";

/** One open map stream. */
export class MapStream {
  constructor(
    readonly request: MapRequest,
    private readonly stream: ServerHttp2Stream,
  ) {}

  send(message: MapResponse): void {
    this.sendBytes(zstdCompressSync(JSON.stringify(message)));
  }

  /** A frame with these bytes as they are. */
  sendBytes(bytes: Uint8Array): void {
    const length = Buffer.alloc(4);
    length.writeUInt32LE(bytes.length);
    this.stream.write(Buffer.concat([length, bytes]));
  }

  end(): void {
    this.stream.end();
  }
}

export class FixtureControl {
  readonly registers: RegisterRequest[] = [];
  readonly updates: MapRequest[] = [];
  readonly streams: MapStream[] = [];
  /** Every other request: "METHOD /path". */
  readonly others: { request: string; body: Uint8Array }[] = [];
  /** A number is an HTTP status, 0 closes the stream without an answer; null never answers. */
  onRegister: (request: RegisterRequest) => RegisterResponse | number | null = () => ({
    User: { ID: 1 },
    MachineAuthorized: true,
  });
  /** A number other than 200 refuses the stream. */
  onMap: (request: MapRequest) => number = () => 200;
  onStream: (stream: MapStream) => void = () => {};
  private readonly sockets = new Set<Socket>();
  private readonly duplexes = new Set<NoiseDuplex>();
  private privateKey = randomBytes(32);

  private constructor(
    private readonly http: HttpServer,
    private readonly http2: Http2Server,
    readonly port: number,
  ) {}

  static async start(port = 0): Promise<FixtureControl> {
    const http = createHttp();
    await new Promise<void>((resolve) => http.listen(port, "127.0.0.1", resolve));
    const control = new FixtureControl(http, createHttp2(), (http.address() as AddressInfo).port);
    control.serve();
    return control;
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  /** Another Noise key: clients that know the old one fail until they ask for /key again. */
  changeKey(): void {
    this.privateKey = randomBytes(32);
  }

  /** Cuts all connections, as a crash would. */
  cut(): void {
    for (const duplex of this.duplexes) duplex.destroy();
    for (const socket of this.sockets) socket.destroy();
  }

  async close(): Promise<void> {
    this.cut();
    await new Promise<void>((resolve) => this.http.close(() => resolve()));
  }

  private serve(): void {
    this.http.on("connection", (socket: Socket) => {
      this.sockets.add(socket);
      socket.on("close", () => this.sockets.delete(socket));
    });
    this.http.on("request", (_request, response) => {
      response.end(JSON.stringify({ publicKey: formatKey("mkey", x25519Public(this.privateKey)) }));
    });
    this.http.on("upgrade", (request, socket, head) => {
      try {
        const responded = respondToInitiation({
          initiation: Buffer.from(String(request.headers["x-tailscale-handshake"]), "base64"),
          controlPrivate: this.privateKey,
          ephemeralPrivate: randomBytes(32),
        });
        const top =
          "HTTP/1.1 101 Switching Protocols\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\r\n";
        const duplex = new NoiseDuplex({
          role: "server",
          socket,
          keys: responded.keys,
          head,
          preamble: Buffer.concat([Buffer.from(top), responded.response]),
          early: { nodeKeyChallenge: `chalpub:${"07".repeat(32)}` },
        });
        this.duplexes.add(duplex);
        duplex.on("close", () => this.duplexes.delete(duplex));
        this.http2.emit("connection", duplex);
      } catch {
        socket.destroy();
      }
    });
    this.http2.on("stream", (stream: ServerHttp2Stream, headers) => {
      const parts: Uint8Array[] = [];
      stream.on("error", () => {});
      stream.on("data", (chunk: Uint8Array) => parts.push(chunk));
      stream.on("end", () => this.answer(stream, `${headers[":method"]} ${headers[":path"]}`, Buffer.concat(parts)));
    });
  }

  private answer(stream: ServerHttp2Stream, request: string, body: Uint8Array): void {
    const end = (status: number, text = "") => {
      stream.respond({ ":status": status });
      stream.end(text);
    };
    if (request === "POST /machine/register") {
      const json = JSON.parse(Buffer.from(body).toString()) as RegisterRequest;
      this.registers.push(json);
      const answer = this.onRegister(json);
      if (answer === null) return;
      if (answer === 0) {
        stream.close();
        return;
      }
      if (typeof answer === "number") end(answer, "no");
      else end(200, JSON.stringify(answer));
    } else if (request === "POST /machine/map") {
      const json = JSON.parse(Buffer.from(body).toString()) as MapRequest;
      if (!json.Stream) {
        this.updates.push(json);
        end(200);
        return;
      }
      const status = this.onMap(json);
      if (status !== 200) {
        end(status, "no");
        return;
      }
      stream.respond({ ":status": 200 });
      const open = new MapStream(json, stream);
      this.streams.push(open);
      this.onStream(open);
    } else {
      this.others.push({ request, body });
      end(200);
    }
  }
}
