// Id tokens of nodes: a node proves to others who it is, by a JWT that this server signs for it
// (POST /machine/id-token; spec/ts2021-control-protocol.md, section 22). Verifiers find the keys by OpenID discovery.

import type { Hono } from "hono";
import { exportJWK, generateKeyPair, importJWK, type JWK, SignJWT } from "jose";
import type { ControlContext } from "./context.ts";
import { nodeOf } from "./features.ts";
import type { MachineRequest, MachineRouter } from "./machine.ts";
import type { Millis } from "./model.ts";
import { addressesOf, namesOf } from "./netmap.ts";
import { BadRequest, objectOf, text } from "./requests.ts";

const ALGORITHM = "RS256";
/** Seconds that a token holds. */
const LIFETIME = 300;
const DAY = 24 * 60 * 60_000;
/** A key signs this long, and is published this much longer. */
const KEY_SIGNS = 30 * DAY;
const KEY_STAYS = 2 * DAY;
const JWKS_PATH = "/.well-known/jwks.json";

export interface SigningKeyRecord {
  /** Private, as JWK. */
  jwk: JWK;
  createdAt: Millis;
}

declare module "./model.ts" {
  interface Documents {
    /** By key id. */
    signingkey: SigningKeyRecord;
  }
}

interface SigningKey extends SigningKeyRecord {
  kid: string;
}

class SigningKeys {
  private making: Promise<SigningKey> | null = null;

  constructor(private readonly ctx: ControlContext) {}

  /** Newest first. */
  private list(): SigningKey[] {
    const keys = [...this.ctx.model.documents("signingkey")].map(([kid, record]) => ({ kid, ...record }));
    return keys.sort((a, b) => b.createdAt - a.createdAt);
  }

  /** The key that signs now; made and stored when there is none, or the last one has signed long enough. */
  current(): Promise<SigningKey> {
    const [newest] = this.list();
    if (newest && this.ctx.now() < newest.createdAt + KEY_SIGNS) return Promise.resolve(newest);
    this.making ??= this.make().finally(() => {
      this.making = null;
    });
    return this.making;
  }

  private async make(): Promise<SigningKey> {
    const { ctx } = this;
    const { privateKey } = await generateKeyPair(ALGORITHM, { extractable: true });
    const kid = Buffer.from(ctx.random(8)).toString("hex");
    const value: SigningKeyRecord = { jwk: await exportJWK(privateKey), createdAt: ctx.now() };
    const over = this.list().filter(({ createdAt }) => createdAt + KEY_SIGNS + KEY_STAYS < ctx.now());
    await ctx.journal.commit({
      documents: [
        { kind: "signingkey", id: kid, value },
        ...over.map((key) => ({ kind: "signingkey" as const, id: key.kid, value: null })),
      ],
    });
    return { kid, ...value };
  }

  /** The public parts of all keys that may have signed a token that still holds. */
  async published(): Promise<JWK[]> {
    await this.current();
    return this.list().map(({ kid, jwk: { kty, n, e } }) => ({
      kty: kty!,
      n: n!,
      e: e!,
      kid,
      alg: ALGORITHM,
      use: "sig",
    }));
  }
}

/** Adds POST /machine/id-token, the discovery document and the keys. */
export function addIdTokens(ctx: ControlContext, machines: MachineRouter, app: Hono): void {
  const keys = new SigningKeys(ctx);
  const issuer = ctx.settings.serverUrl;

  async function idToken({ body, connection }: MachineRequest) {
    const fields = objectOf(body);
    const node = nodeOf(ctx, fields, connection.machineKey);
    const audience = text(fields, "Audience", 512);
    if (audience === "") throw new BadRequest("Audience is missing: who shall take the token?");
    const name = `${node.givenName}.${ctx.config.baseDomain}`;
    const user = node.userId === null ? undefined : ctx.model.users.get(node.userId);
    const { kid, jwk } = await keys.current();
    const now = Math.floor(ctx.now() / 1000);
    const token = await new SignJWT({
      key: node.nodeKey,
      addresses: addressesOf(node),
      nid: node.id,
      node: name,
      domain: ctx.config.baseDomain,
      ...(user ? { user: namesOf(user).LoginName, uid: user.id } : { tags: [...node.tags] }),
    })
      .setProtectedHeader({ alg: ALGORITHM, typ: "JWT", kid })
      .setIssuer(issuer)
      .setSubject(name)
      .setAudience(audience)
      .setIssuedAt(now)
      .setNotBefore(now)
      .setExpirationTime(now + LIFETIME)
      .setJti(Buffer.from(ctx.random(16)).toString("hex"))
      .sign(await importJWK(jwk, ALGORITHM));
    return { json: { id_token: token } };
  }

  machines.on("POST", "/machine/id-token", idToken);
  app.get("/.well-known/openid-configuration", (c) =>
    c.json({
      issuer,
      jwks_uri: `${issuer}${JWKS_PATH}`,
      response_types_supported: ["id_token"],
      subject_types_supported: ["public"],
      id_token_signing_alg_values_supported: [ALGORITHM],
      claims_supported: [
        "sub",
        "aud",
        "exp",
        "iat",
        "iss",
        "jti",
        "nbf",
        "key",
        "addresses",
        "nid",
        "node",
        "domain",
        "tags",
        "user",
        "uid",
      ],
    }),
  );
  app.get(JWKS_PATH, async (c) => {
    c.header("Cache-Control", "public, max-age=3600");
    return c.json({ keys: await keys.published() });
  });
}
