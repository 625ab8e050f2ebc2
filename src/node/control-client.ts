// The node's side of its control server: register, follow the map stream, report changes, answer pings
// (spec/ts2021-control-protocol.md, sections 9 to 12, 21 and 25).
//
// Two loops. One registers and then holds a map stream open, again and again with back-off; the netmap of the last stream
// stays in effect meanwhile. The other sends a lite update whenever something about this node has changed. A server that no
// longer knows the node makes it register again: without the auth key first, with it if there is one.
import { formatKey } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import { Backoff } from "../net/backoff.ts";
import { ControlUnreachable, requestPlain, Ts2021Client } from "../net/ts2021-client.ts";
import type {
  Hostinfo,
  MapRequest,
  MapResponse,
  NetInfo,
  PingRequest,
  PingResponse,
  RegisterRequest,
  RegisterResponse,
  UserProfile,
} from "../wire/tailcfg.ts";
import { CAPABILITY_VERSION, LOGOUT_EXPIRY, ZERO_TIME } from "../wire/tailcfg.ts";
import { answerC2N } from "./c2n.ts";
import { decodeMapFrame, MapFrameReader } from "./map-stream.ts";
import { keyExpired, type Netmap, type NetmapChange, NetmapSession, timeOf } from "./netmap.ts";
import type { Identity } from "./state.ts";

const MAX_ANSWER = 1024 * 1024;
const REQUEST_TIMEOUT = 15_000;
/** Silence on the map stream after which it counts as dead; servers send a keep-alive about every 50 s. */
const WATCHDOG = 120_000;
const WATCHDOG_CHECKS = 24;
const MAX_BACKOFF = 15_000;
/** A map stream that lived this long was a good one: the next attempts are fast again. */
const GOOD_STREAM = 10_000;
/** A node that was let in before and is refused now asks again: an operator may have mended what was wrong. */
const ASK_AGAIN = 60_000;
/** A timer that is set further ahead than this fires at once. */
const MAX_TIMER = 2 ** 31 - 1;

export type LoginState =
  /** No answer from the server yet, or none at the moment. */
  | { kind: "connecting" }
  /** The server wants a person (`authUrl`) or has refused (`error`, a sentence). */
  | { kind: "needs-login"; authUrl: string; error: string }
  /** Registered. */
  | { kind: "in" };

export interface ControlEvents {
  /** The node key or the user changed: it must be on disk when the call returns. */
  onIdentity(identity: Identity): void;
  onLogin(state: LoginState): void;
  onNetmap(netmap: Netmap, change: NetmapChange): void;
  /** The map stream came up, or ended. */
  onConnected(connected: boolean): void;
  /** A ping that control asks for: type "disco" and so on. */
  onPing(type: string, ip: string): Promise<PingResponse>;
  log(level: "info" | "debug", message: string): void;
}

export interface ControlClientOptions {
  serverUrl: string;
  machinePrivate: Uint8Array;
  /** Null: a new node. */
  identity: Identity | null;
  /** Used whenever the server asks for authentication; "" is none. */
  authKey: string;
  ephemeral: boolean;
  discoPublic: Uint8Array;
  hostinfo: Hostinfo;
  randomBytes: (n: number) => Uint8Array;
  /** Unix time in milliseconds. */
  now: () => number;
  /** Milliseconds of silence after which the map stream is dead. Default 120 s. */
  watchdog?: number;
  /** Milliseconds after which a known node that was refused asks again. Default 60 s. */
  askAgain?: number;
}

type Registered = "done" | "needs-login";

/** The server answered, and the answer is no. */
class Refused extends Error {
  override name = "Refused";
}

export class ControlClient {
  private readonly connection: Ts2021Client;
  private readonly stopped = new AbortController();
  private readonly backoff = new Backoff(MAX_BACKOFF);
  private readonly updateBackoff = new Backoff(MAX_BACKOFF);
  private identity: Identity | null;
  private authKey: string;
  private hostinfo: Hostinfo;
  private netInfo: NetInfo | null = null;
  private endpoints: string[] = [];
  private endpointTypes: number[] = [];
  private registered = false;
  /** Register with a new node key next time. */
  private rotate = false;
  private login: LoginState = { kind: "connecting" };
  /** Something that the server should know has changed. */
  private dirty = false;
  private updating = false;
  private lastPingUrl = "";
  private expiryTimer: ReturnType<typeof setTimeout> | undefined;
  /** Ends the map stream, or the wait for a person's decision. */
  private longPoll: AbortController | null = null;
  private lastError = "";
  /** `retryLogin` was called since the last attempt began. */
  private loginAsked = false;
  private wakeUp: (() => void) | null = null;
  private running: Promise<void> | null = null;

  constructor(
    private readonly options: ControlClientOptions,
    private readonly events: ControlEvents,
  ) {
    this.identity = options.identity;
    this.authKey = options.authKey;
    this.hostinfo = options.hostinfo;
    this.connection = new Ts2021Client({
      serverUrl: options.serverUrl,
      machinePrivate: options.machinePrivate,
      version: CAPABILITY_VERSION,
      randomBytes: options.randomBytes,
    });
  }

  start(): void {
    this.running ??= this.run();
  }

  /** Ends both loops and the connection. */
  async stop(): Promise<void> {
    this.stopped.abort();
    clearTimeout(this.expiryTimer);
    this.longPoll?.abort();
    this.wakeUp?.();
    this.connection.close();
    await this.running;
  }

  /** Tries to log in again, now; "" keeps the auth key that is configured. */
  retryLogin(authKey: string): void {
    if (authKey !== "") this.authKey = authKey;
    this.backoff.reset();
    if (this.login.kind === "in") return;
    this.loginAsked = true;
    this.setLogin({ kind: "connecting" });
    this.registered = false;
    this.longPoll?.abort();
    this.wakeUp?.();
  }

  /** There is reason to think that the server can be reached again: cuts the present wait short. */
  hurry(): void {
    if (this.login.kind === "needs-login") return;
    this.backoff.reset();
    this.wakeUp?.();
  }

  setEndpoints(endpoints: string[], types: number[]): void {
    this.endpoints = endpoints;
    this.endpointTypes = types;
    this.noteChange();
  }

  setNetInfo(netInfo: NetInfo): void {
    this.netInfo = netInfo;
    this.noteChange();
  }

  setHostinfo(hostinfo: Hostinfo): void {
    this.hostinfo = hostinfo;
    this.noteChange();
  }

  /** Tells the server that this node's key ends now. Best effort within 5 s. */
  async logout(): Promise<void> {
    if (!this.identity || !this.registered) return;
    try {
      const body: RegisterRequest = { ...this.registerRequest(this.identity), Expiry: LOGOUT_EXPIRY };
      await this.connection.request(
        { method: "POST", path: "/machine/register", body: JSON.stringify(body), signal: this.stopped.signal },
        MAX_ANSWER,
        5000,
      );
    } catch (error) {
      this.events.log("info", `the control server was not told of the logout: ${(error as Error).message}`);
    }
  }

  // ---- the first loop: register, then stream ----

  private async run(): Promise<void> {
    while (!this.stopped.signal.aborted) {
      try {
        if (!this.registered) {
          this.loginAsked = false;
          if ((await this.register()) === "needs-login") {
            // What came in the meantime may open the door.
            if (this.loginAsked) continue;
            await this.sleep(this.identity?.user ? (this.options.askAgain ?? ASK_AGAIN) : null);
            continue;
          }
          this.registered = true;
        }
        await this.followMap();
      } catch (error) {
        if (this.stopped.signal.aborted) return;
        this.logError((error as Error).message);
      }
      await this.sleep(this.backoff.next(this.random()));
    }
  }

  /** From 0 to 1. */
  private random(): number {
    const bytes = this.options.randomBytes(4);
    return new DataView(bytes.buffer, bytes.byteOffset).getUint32(0) / 2 ** 32;
  }

  /** A server that stays away is news once. */
  private logError(message: string): void {
    this.events.log(message === this.lastError ? "debug" : "info", message);
    this.lastError = message;
  }

  /** Null: until someone wakes us. */
  private sleep(ms: number | null): Promise<void> {
    if (this.stopped.signal.aborted) return Promise.resolve();
    return new Promise((resolve) => {
      const timer = ms === null ? undefined : setTimeout(() => this.wakeUp?.(), ms);
      this.wakeUp = () => {
        clearTimeout(timer);
        this.wakeUp = null;
        resolve();
      };
    });
  }

  private setLogin(state: LoginState): void {
    this.login = state;
    this.events.onLogin(state);
  }

  private needsLogin(error: string, authUrl = ""): Registered {
    this.setLogin({ kind: "needs-login", authUrl, error });
    return "needs-login";
  }

  /** Throws ControlUnreachable when it is worth trying again. */
  private async register(): Promise<Registered> {
    if (!this.identity) {
      // On disk before the server hears of it: a crash in between must not cost the key that the server then knows.
      this.setIdentity({ nodePrivate: this.options.randomBytes(32), oldNodePrivate: null, user: null, nodeId: "" });
    }
    let candidate = this.identity!;
    // A node that was accepted before needs no key: one that has been used up or has expired must not lock it out.
    let auth = candidate.user && !this.rotate ? "" : this.authKey;
    let rotated = false;
    for (;;) {
      if (this.rotate && !rotated) {
        candidate = this.rotatedIdentity(candidate);
        rotated = true;
      }
      let answer: RegisterResponse;
      try {
        answer = await this.postRegister(candidate, auth, "");
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        answer = { Error: error.message };
      }
      const canAuthenticate = auth === "" && this.authKey !== "";
      if (answer.NodeKeyExpired && !answer.Error) {
        if (rotated) return this.needsLogin("the control server says that the new node key has expired");
        this.rotate = true;
        auth = this.authKey;
      } else if ((answer.Error || answer.AuthURL) && canAuthenticate) {
        auth = this.authKey;
      } else if (answer.Error) {
        return this.needsLogin(`the control server does not let this node in: ${answer.Error}`);
      } else if (answer.AuthURL) {
        return this.followUp(candidate, answer.AuthURL);
      } else {
        return this.accept(candidate, answer);
      }
    }
  }

  /** Waits while a person decides at `url`, or until `retryLogin` brings another way in. */
  private async followUp(candidate: Identity, url: string): Promise<Registered> {
    this.needsLogin("", url);
    const wait = new AbortController();
    this.longPoll = wait;
    try {
      for (let current = url; ; ) {
        const answer = await this.askForDecision(candidate, current, wait.signal);
        if (this.stopped.signal.aborted) return "needs-login";
        if (wait.signal.aborted) return await this.register();
        if (!answer) continue;
        if (answer.Error) return this.needsLogin(`the control server refused the login: ${answer.Error}`);
        if (!answer.AuthURL) return this.accept(candidate, answer);
        if (answer.AuthURL === current) await this.sleep(this.backoff.next(this.random()));
        else this.needsLogin("", answer.AuthURL);
        current = answer.AuthURL;
      }
    } finally {
      if (this.longPoll === wait) this.longPoll = null;
    }
  }

  /** Null when the server could not be asked; a while has passed then. */
  private async askForDecision(
    candidate: Identity,
    url: string,
    signal: AbortSignal,
  ): Promise<RegisterResponse | null> {
    try {
      return await this.postRegister(candidate, "", url, signal);
    } catch (error) {
      if (error instanceof Refused) return { Error: error.message };
      if (!signal.aborted) await this.sleep(this.backoff.next(this.random()));
      return null;
    }
  }

  private accept(candidate: Identity, answer: RegisterResponse): Registered {
    this.rotate = false;
    this.setIdentity({ ...candidate, user: userOf(answer) });
    this.setLogin({ kind: "in" });
    return "done";
  }

  private rotatedIdentity(identity: Identity): Identity {
    return {
      ...identity,
      nodePrivate: this.options.randomBytes(32),
      oldNodePrivate: identity.nodePrivate,
    };
  }

  private setIdentity(identity: Identity): void {
    this.identity = identity;
    this.events.onIdentity(identity);
  }

  private registerRequest(identity: Identity): RegisterRequest {
    return {
      Version: CAPABILITY_VERSION,
      NodeKey: formatKey("nodekey", x25519Public(identity.nodePrivate)),
      OldNodeKey: formatKey(
        "nodekey",
        identity.oldNodePrivate ? x25519Public(identity.oldNodePrivate) : new Uint8Array(32),
      ),
      Expiry: ZERO_TIME,
      Hostinfo: this.fullHostinfo(),
      Ephemeral: this.options.ephemeral,
      Timestamp: new Date(this.options.now()).toISOString(),
    };
  }

  private async postRegister(
    identity: Identity,
    auth: string,
    followup: string,
    signal: AbortSignal = this.stopped.signal,
  ): Promise<RegisterResponse> {
    const body: RegisterRequest = {
      ...this.registerRequest(identity),
      ...(auth ? { Auth: { AuthKey: auth } } : {}),
      Followup: followup,
    };
    const request = {
      method: "POST" as const,
      path: "/machine/register",
      body: JSON.stringify(body),
      signal,
    };
    // A follow-up is a long poll: the server holds it for as long as the person takes.
    const timeout = followup ? 10 * 60_000 : REQUEST_TIMEOUT;
    const answer = await this.connection.request(request, MAX_ANSWER, timeout);
    const text = new TextDecoder().decode(answer.body);
    if (answer.status === 400 || answer.status === 401 || answer.status === 403)
      throw new Refused(text.slice(0, 200).trim() || `status ${answer.status}`);
    if (answer.status !== 200)
      throw new ControlUnreachable(`the control server answered the registration with status ${answer.status}`);
    try {
      const value: unknown = JSON.parse(text);
      if (typeof value === "object" && value !== null) return value as RegisterResponse;
    } catch {
      // Said below.
    }
    throw new ControlUnreachable("the control server answered the registration with something that is no JSON object");
  }

  /** One map stream, from the request to its end. */
  private async followMap(): Promise<void> {
    const abort = new AbortController();
    this.longPoll = abort;
    let lastMessage = this.options.now();
    const limit = this.options.watchdog ?? WATCHDOG;
    const watchdog = setInterval(() => {
      if (this.options.now() - lastMessage < limit) return;
      this.events.log("info", `the map stream was silent for ${limit / 1000} s`);
      // The whole connection is suspect: a peer that vanished gives no sign.
      this.connection.drop();
      abort.abort();
    }, limit / WATCHDOG_CHECKS);
    const began = this.options.now();
    let connected = false;
    try {
      const stream = await this.connection.stream({
        method: "POST",
        path: "/machine/map",
        body: JSON.stringify({ ...this.mapRequest(), Stream: true, KeepAlive: true, Compress: "zstd" }),
        signal: AbortSignal.any([abort.signal, this.stopped.signal]),
      });
      if (stream.status !== 200) {
        stream.close();
        this.onMapRefused(stream.status);
      }
      const reader = new MapFrameReader();
      const session = new NetmapSession();
      for await (const chunk of stream.chunks) {
        lastMessage = this.options.now();
        for (const frame of reader.push(chunk)) {
          this.onMessage(session, decodeMapFrame(frame, true));
          if (connected || !session.netmap) continue;
          connected = true;
          this.lastError = "";
          this.events.onConnected(true);
          // Servers take nothing about this node from a stream request.
          this.noteChange();
        }
      }
      this.events.log("debug", "the control server ended the map stream");
    } finally {
      clearInterval(watchdog);
      abort.abort();
      this.longPoll = null;
      if (connected && this.options.now() - began >= GOOD_STREAM) this.backoff.reset();
      if (connected) this.events.onConnected(false);
    }
  }

  private onMapRefused(status: number): never {
    if (status === 400 || status === 401 || status === 403 || status === 404) {
      // Deleted on the server, or its key has ended there.
      this.registered = false;
      throw new ControlUnreachable(
        `the control server no longer knows this node (status ${status}): registering again`,
      );
    }
    throw new ControlUnreachable(`the control server answered the map request with status ${status}`);
  }

  private onMessage(session: NetmapSession, message: MapResponse): void {
    if (message.PingRequest) void this.answerPing(message.PingRequest);
    const change = session.apply(message, this.options.now());
    const { netmap } = session;
    if (!netmap || !Object.values(change).some(Boolean)) return;
    if (change.self) this.onSelf(netmap);
    this.events.onNetmap(netmap, change);
  }

  private onSelf(netmap: Netmap): void {
    const nodeId = netmap.self.StableID ?? "";
    const profile = netmap.users.get(netmap.self.User ?? 0);
    if (this.identity && (this.identity.nodeId !== nodeId || (profile && profile.ID !== this.identity.user?.ID)))
      this.setIdentity({ ...this.identity, nodeId, user: profile ?? this.identity.user });
    this.watchExpiry(netmap);
  }

  /** An expired key needs a new login; a server that extends it says so on the same stream. */
  private watchExpiry(netmap: Netmap): void {
    clearTimeout(this.expiryTimer);
    const now = this.options.now();
    if (keyExpired(netmap.self, now)) {
      this.rotate = true;
      if (this.authKey === "") {
        this.needsLogin("this node's key has expired: log in again with `weft up --auth-key KEY`");
        return;
      }
      this.registered = false;
      this.setLogin({ kind: "connecting" });
      this.longPoll?.abort();
      return;
    }
    this.rotate = false;
    if (this.login.kind !== "in") this.setLogin({ kind: "in" });
    const expiry = timeOf(netmap.self.KeyExpiry);
    if (expiry === null) return;
    this.expiryTimer = setTimeout(() => this.watchExpiry(netmap), Math.min(expiry - now + 100, MAX_TIMER));
  }

  // ---- the second loop: what the server should know of this node ----

  private fullHostinfo(): Hostinfo {
    return this.netInfo ? { ...this.hostinfo, NetInfo: this.netInfo } : this.hostinfo;
  }

  private mapRequest(): MapRequest {
    return {
      Version: CAPABILITY_VERSION,
      NodeKey: formatKey("nodekey", x25519Public(this.identity!.nodePrivate)),
      DiscoKey: formatKey("discokey", this.options.discoPublic),
      Hostinfo: this.fullHostinfo(),
      Endpoints: this.endpoints,
      EndpointTypes: this.endpointTypes,
    };
  }

  private noteChange(): void {
    this.dirty = true;
    void this.sendUpdates();
  }

  private async sendUpdates(): Promise<void> {
    if (this.updating) return;
    this.updating = true;
    try {
      while (this.dirty && this.registered && this.longPoll && !this.stopped.signal.aborted) {
        this.dirty = false;
        try {
          await this.sendUpdate();
          this.updateBackoff.reset();
        } catch (error) {
          this.dirty = true;
          this.events.log("debug", (error as Error).message);
          await new Promise((resolve) => setTimeout(resolve, this.updateBackoff.next(this.random())));
        }
      }
    } finally {
      this.updating = false;
    }
  }

  private async sendUpdate(): Promise<void> {
    const body = JSON.stringify({ ...this.mapRequest(), Stream: false, OmitPeers: true, Compress: "zstd" });
    const request = { method: "POST" as const, path: "/machine/map", body, signal: this.stopped.signal };
    const { status } = await this.connection.request(request, MAX_ANSWER, REQUEST_TIMEOUT);
    if (status >= 300) throw new ControlUnreachable(`the control server answered an update with status ${status}`);
  }

  // ---- pings ----

  private async answerPing(ping: PingRequest): Promise<void> {
    const url = ping.URL;
    if (typeof url !== "string" || url === "" || url === this.lastPingUrl) return;
    this.lastPingUrl = url;
    try {
      const target = new URL(url);
      const types = typeof ping.Types === "string" ? ping.Types : "";
      if (types === "") {
        await this.deliver(target, ping, "HEAD");
      } else if (types === "c2n") {
        await this.deliver(target, ping, "POST", answerC2N(Buffer.from(String(ping.Payload ?? ""), "base64")));
      } else {
        for (const type of types.split(",").slice(0, 4)) {
          const result = await this.events.onPing(type, String(ping.IP ?? ""));
          await this.deliver(target, ping, "POST", new TextEncoder().encode(JSON.stringify(result)));
        }
      }
    } catch (error) {
      this.events.log("debug", `a ping request was not answered: ${(error as Error).message}`);
    }
  }

  private async deliver(url: URL, ping: PingRequest, method: "HEAD" | "POST", body?: Uint8Array): Promise<void> {
    const { signal } = this.stopped;
    if (ping.URLIsNoise) {
      const request = { method, path: url.pathname + url.search, signal, ...(body ? { body } : {}) };
      await this.connection.request(request, MAX_ANSWER, REQUEST_TIMEOUT);
      return;
    }
    // The answer goes nowhere but to the server that asked.
    if (url.origin !== new URL(this.options.serverUrl).origin)
      throw new Error(`${url.origin} is not the control server`);
    await requestPlain(url, method, MAX_ANSWER, REQUEST_TIMEOUT, signal, body);
  }
}

function userOf({ Login, User }: RegisterResponse): UserProfile | null {
  const ID = User?.ID || Login?.ID;
  if (!ID) return null;
  return {
    ID,
    LoginName: Login?.LoginName ?? "",
    DisplayName: Login?.DisplayName ?? User?.DisplayName ?? "",
  };
}
