// The load of `bun run bench handshake`, a process of its own, so that it has a core of its own:
//
//   bun handshake-load.ts RESPONDER_KEY PEERS COUNT     makes COUNT initiations, prints {"ready":true}, then reads lines
//   IP PORT WARM_SECONDS SECONDS                        and answers each with {"measuring":true} once it is warm, and at the end
//                                                       with {answered, seconds, cookies, unanswered}
//
// It speaks for many peers, each from an address of its own, since devices under load limit what one address may ask. A number
// of handshakes is under way at any time; cookies are taken and used as the protocol demands.
import {
  messageType,
  parseCookieReply,
  parseResponse,
  TYPE_COOKIE_REPLY,
  TYPE_RESPONSE,
} from "../src/wire/wireguard.ts";
import { CookieJar } from "../src/wireguard/cookie.ts";
import { identity, initiations, sourceOf } from "./lib/initiations.ts";

/** Below the queue length at which the Go program believes to be flooded, enough to keep any busy. */
const UNDER_WAY = 64;
/** An initiation that has no answer by then will get none. */
const PATIENCE_MS = 500;

const [keyText = "", peerCount = "", total = ""] = process.argv.slice(2);
const responder = new Uint8Array(Buffer.from(keyText, "base64"));
const peers = Number(peerCount);
const each = Math.ceil(Number(total) / peers);
const messages: Uint8Array[][] = [];
for (let i = 0; i < peers; i++) {
  const source = initiations(identity(`peer ${i}`), responder, i * each);
  messages.push(Array.from({ length: each }, () => source.next().value as Uint8Array));
}
print({ ready: true });

for await (const line of console) {
  const [ip, port, warm, seconds] = line.split(" ");
  if (ip && port) print(await run(ip, Number(port), Number(warm), Number(seconds)));
}

function print(value: object): void {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

interface Speaker {
  number: number;
  socket: Bun.udp.ConnectedSocket<"uint8array">;
  jar: CookieJar;
  /** Which of its messages is next, and whether the one before is still under way since then (ms). */
  next: number;
  since: number;
  /** Asked again after a cookie. */
  again: boolean;
}

async function run(ip: string, port: number, warm: number, seconds: number): Promise<object> {
  const speakers: Speaker[] = [];
  const idle: Speaker[] = [];
  const busy = new Set<Speaker>();
  let answered = 0;
  let cookies = 0;
  let unanswered = 0;
  let over = false;

  const send = (speaker: Speaker): void => {
    const message = messages[speaker.number]![speaker.next]!;
    speaker.since = performance.now();
    speaker.jar.sign(message, speaker.since);
    speaker.socket.send(message);
  };
  const begin = (): void => {
    while (!over && busy.size < UNDER_WAY) {
      const speaker = idle.shift();
      if (!speaker) return;
      busy.add(speaker);
      send(speaker);
    }
  };
  const done = (speaker: Speaker): void => {
    busy.delete(speaker);
    speaker.next++;
    speaker.again = false;
    // Used up: this one has nothing more to say.
    if (speaker.next < each) idle.push(speaker);
  };
  const receive = (speaker: Speaker, bytes: Uint8Array): void => {
    const expected = speaker.number * each + speaker.next;
    if (!busy.has(speaker)) return;
    const type = messageType(bytes);
    if (type === TYPE_RESPONSE && parseResponse(bytes)?.receiver === expected) {
      answered++;
      done(speaker);
      begin();
    } else if (type === TYPE_COOKIE_REPLY) {
      const reply = parseCookieReply(bytes);
      if (reply?.receiver !== expected || !speaker.jar.accept(reply, performance.now())) return;
      cookies++;
      if (speaker.again) return;
      speaker.again = true;
      send(speaker);
    }
  };

  for (let number = 0; number < peers; number++) {
    const speaker = { number, jar: new CookieJar(responder), next: 0, since: 0, again: false } as Speaker;
    speaker.socket = await Bun.udpSocket({
      hostname: sourceOf(number),
      connect: { hostname: ip, port },
      binaryType: "uint8array",
      // Refused: nobody listens (yet), which shows as no answer.
      socket: { data: (_, bytes) => receive(speaker, bytes), error: () => {} },
    });
    speakers.push(speaker);
    idle.push(speaker);
  }
  const patience = setInterval(() => {
    const now = performance.now();
    for (const speaker of [...busy]) {
      if (now - speaker.since < PATIENCE_MS) continue;
      unanswered++;
      done(speaker);
    }
    begin();
  }, 50);
  begin();
  await Bun.sleep(warm * 1000);
  print({ measuring: true });
  const before = { answered, cookies, unanswered, at: performance.now() };
  const end = before.at + seconds * 1000;
  while (performance.now() < end && (busy.size > 0 || idle.length > 0)) await Bun.sleep(10);
  const took = (performance.now() - before.at) / 1000;
  const result = {
    answered: answered - before.answered,
    seconds: took,
    cookies: cookies - before.cookies,
    unanswered: unanswered - before.unanswered,
  };
  over = true;
  clearInterval(patience);
  for (const { socket } of speakers) socket.close();
  return result;
}
