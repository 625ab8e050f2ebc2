// The relay: DERP server and STUN server.
export { createRelay, type Relay, type RelayOptions, type Upgrade } from "./http.ts";
export { metaCertificate } from "./metacert.ts";
export type { RelayLimits } from "./server.ts";
export { type StunOptions, type StunServer, startStun } from "./stun.ts";
