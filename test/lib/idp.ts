// `bun test/lib/idp.ts HOST PORT REDIRECT-URI[,…] TOKEN-SECONDS`: a real identity provider (oidc-provider) on a host of a test's
// network. Its accounts are "alice" and "bob"; any password will do.
import { IdentityProvider } from "../../src/control/pages/testing.ts";

const [host = "", port = "", redirectUris = "", seconds = "3600"] = process.argv.slice(2);
const account = (name: string, groups: string[]) => ({
  name: `${name} of the tests`,
  preferred_username: name,
  email: `${name}@example.com`,
  email_verified: true,
  groups,
});
const { issuer } = await IdentityProvider.start({
  host,
  port: Number(port),
  redirectUris: redirectUris.split(","),
  accounts: { alice: account("alice", ["eng"]), bob: account("bob", []) },
  idTokenTtl: Number(seconds),
});
console.log(`identity provider ready: ${issuer}`);
