// HuJSON text -> Policy. Everything that can be said about a policy without knowing the tailnet is checked here, in the
// order definitions, rules, tests; the first fault is reported with its place.
import { derpMapOf } from "../derpmap-parse.ts";
import { INTERNET, isEverything, parseRange, type Range, RangeSet, TAILNET } from "./addresses.ts";
import { formatDuration, parseDuration } from "./duration.ts";
import { PolicyError } from "./error.ts";
import { parseHuJSON, placeAt, type Value } from "./hujson.ts";
import { parseOpening, parseProtocol, splitPorts } from "./ports.ts";
import { parseCondition } from "./postures.ts";
import { type Definitions, parseSelector, standsForUsers } from "./selectors.ts";
import type {
  Access,
  CapabilityValues,
  Condition,
  Destination,
  NodeAttribute,
  Policy,
  PolicyTest,
  Selector,
  SSHEntry,
  SSHTest,
} from "./types.ts";

const SELF_NEEDS_USERS = "autogroup:self can only be used with users, groups, or supported autogroups";

/** Ranges of IP sets that are handled in all, those of sets in other sets each time. */
const MAX_SET_RANGES = 2_000_000;
/** 168 hours. */
const MAX_CHECK_PERIOD = 168 * 3.6e6;

/** Capabilities of tailscale.com that a policy may hand out: those of clients, and of programs that read them. */
const OPEN_CAPABILITIES = new Set(
  ["drive", "relay", "webui", "kubernetes", "tsidp", "secrets", "golink", "aperture", "proxy-to-grafana"].map(
    (name) => `tailscale.com/cap/${name}`,
  ),
);

/** Sections of the hosted service that mean nothing here. */
const REFUSED: Readonly<Record<string, string>> = {
  regionalrouting: "regionalRouting is a service of Tailscale's own relays and not supported",
};

/** Runs `parse`; a bare Error becomes a PolicyError at the place of `at`, its sentence passed through `say`. */
function at<T>(value: Value, parse: () => T, say: (message: string) => string = (message) => message): T {
  try {
    return parse();
  } catch (error) {
    if (error instanceof PolicyError || !(error instanceof Error)) throw error;
    throw value.wrong(say(error.message));
  }
}

/** Fields by lower-case name; names that begin with "#" are comments. */
function fieldsOf(value: Value, what: string, known: readonly string[]): Map<string, Value> {
  const fields = new Map<string, Value>();
  for (const [key, field, place] of value.entries(what)) {
    if (key.startsWith("#")) continue;
    const name = known.find((each) => each.toLowerCase() === key.toLowerCase());
    if (name === undefined) throw place.wrong(`json: unknown field ${JSON.stringify(key)}`);
    if (fields.has(name)) throw place.wrong(`the key "${name}" stands twice in ${what}`);
    fields.set(name, field);
  }
  return fields;
}

class Parser implements Definitions {
  readonly groups = new Map<string, readonly Selector[]>();
  readonly hosts = new Map<string, Range>();
  readonly tagOwners = new Map<string, readonly Selector[]>();
  readonly ipsets = new Map<string, RangeSet>();
  readonly postures = new Map<string, readonly Condition[]>();
  private defaultPostures: readonly string[] = [];

  constructor(
    private readonly sections: Map<string, Value>,
    readonly isForeignGroup: (name: string) => boolean,
  ) {}

  policy(text: string): Policy {
    this.readHosts();
    this.readGroups();
    this.readIPSets();
    this.readTagOwners();
    this.readPostures();
    const list = <T>(name: string, read: (entry: Value, index: number) => T): T[] =>
      (this.sections.get(name)?.items(name) ?? []).map(read);
    const flag = (name: string): boolean => this.sections.get(name)?.boolean(name) ?? false;
    const accesses = [
      ...list("grants", (entry, index) => this.grant(entry, index)),
      ...list("acls", (entry, index) => this.acl(entry, index)),
    ];
    return {
      text,
      groups: this.groups,
      isForeignGroup: this.isForeignGroup,
      hosts: this.hosts,
      tagOwners: this.tagOwners,
      ipsets: this.ipsets,
      postures: this.postures,
      accesses: this.sections.has("grants") || this.sections.has("acls") ? accesses : null,
      approvers: this.approvers(),
      ssh: list("ssh", (entry, index) => this.ssh(entry, index)),
      nodeAttributes: list("nodeAttrs", (entry, index) => this.nodeAttribute(entry, index)),
      tests: list("tests", (entry) => this.test(entry)),
      sshTests: list("sshTests", (entry) => this.sshTest(entry)),
      randomizeClientPort: flag("randomizeClientPort"),
      disableIPv4: flag("disableIPv4"),
      oneCGNAT: this.oneCGNAT(),
      derpMap: this.derpMap(),
    };
  }

  private definitions(section: string): [name: string, value: Value, at: Value][] {
    return this.sections.get(section)?.entries(section) ?? [];
  }

  // ---- definitions ----

  private readHosts(): void {
    for (const [name, value, place] of this.definitions("hosts")) {
      if (name.includes("@"))
        throw place.wrong(`host names cannot include an @, please change the name for ${JSON.stringify(name)}`);
      if (name.includes(":")) throw place.wrong("host name must not contain colon (:)");
      if (name === "" || name === "*")
        throw place.wrong(`hosts[${JSON.stringify(name)}]: a host needs a name that is no word of the language`);
      const text = value.string(`hosts[${JSON.stringify(name)}]`);
      const range = parseRange(text.trim());
      if (!range) throw value.wrong(`hosts[${JSON.stringify(name)}]: ${JSON.stringify(text)} is no IP address or CIDR`);
      this.hosts.set(name, range);
    }
  }

  private readGroups(): void {
    const entries = this.definitions("groups");
    for (const [name, , place] of entries) {
      if (!name.startsWith("group:") || name === "group:") {
        throw place.wrong(`groups[${JSON.stringify(name)}]: group names must start with "group:"`);
      }
    }
    // A group inside a group is reported where the chain ends.
    const members = new Map(entries.map(([name, value]) => [name, value.strings(`groups[${JSON.stringify(name)}]`)]));
    const visited = new Set<string>();
    const visit = (name: string): void => {
      if (visited.has(name)) return;
      visited.add(name);
      const users: Selector[] = [];
      for (const { text, at: place } of members.get(name)!) {
        const member = text.trim();
        const where = `groups[${JSON.stringify(name)}]: ${JSON.stringify(member)}`;
        if (member.startsWith("group:")) {
          if (members.has(member)) visit(member);
          throw place.wrong(`${where}: group members cannot be recursive`);
        }
        if (member.startsWith("autogroup:") || member.startsWith("tag:") || !member.includes("@")) {
          throw place.wrong(`${where}: group members must be users, like "name@" or "name@example.com"`);
        }
        users.push(at(place, () => parseSelector(member, this)));
      }
      this.groups.set(name, users);
    };
    for (const [name] of entries) visit(name);
  }

  private readTagOwners(): void {
    const entries = this.definitions("tagOwners");
    for (const [name, , place] of entries) {
      const where = `tagOwners[${JSON.stringify(name)}]`;
      if (!name.startsWith("tag:")) throw place.wrong(`${where}: tags must start with 'tag:'`);
      if (name === "tag:") throw place.wrong(`${where}: tag names must not be empty`);
      if (!/^tag:[a-zA-Z]/.test(name)) throw place.wrong(`${where}: tag names must start with a letter, after 'tag:'`);
      if (!/^tag:[a-zA-Z0-9-]+$/.test(name)) {
        throw place.wrong(`${where}: tag names can only contain numbers, letters, or dashes`);
      }
      this.tagOwners.set(name, []);
    }
    for (const [name, value] of entries) {
      const where = `tagOwners[${JSON.stringify(name)}]`;
      const owners = value.strings(where).map(({ text, at: place }) => {
        const owner = at(
          place,
          () => parseSelector(text, this),
          (message) => `${where}: ${message}`,
        );
        if (owner.kind !== "tag" && !standsForUsers(owner))
          throw place.wrong(`${where}: ${JSON.stringify(owner.text)} is no user, group or tag`);
        return owner;
      });
      this.tagOwners.set(name, owners);
    }
  }

  private readIPSets(): void {
    const entries = this.definitions("ipsets");
    const lists = new Map(entries.map(([name, value]) => [name, value.strings(`ipsets[${JSON.stringify(name)}]`)]));
    const open = new Set<string>();
    let handled = 0;
    const spend = (count: number, entry: Value): void => {
      handled += count;
      if (handled > MAX_SET_RANGES)
        throw entry.wrong(`the IP sets expand to more than ${MAX_SET_RANGES} ranges here: use fewer or wider ones`);
    };
    const resolve = (name: string, place: Value): RangeSet => {
      const done = this.ipsets.get(name);
      if (done) return done;
      if (open.has(name)) throw place.wrong(`ipsets[${JSON.stringify(name)}] contains itself`);
      open.add(name);
      let set = RangeSet.EMPTY;
      /** What follows one another in the list and goes the same way is one step. */
      let step: { isRemoval: boolean; ranges: Range[] } = { isRemoval: false, ranges: [] };
      const take = (): void => {
        const { isRemoval, ranges } = step;
        set = isRemoval ? set.without(RangeSet.of(ranges)) : RangeSet.of([...set.ranges, ...ranges]);
      };
      for (const { text, at: entry } of lists.get(name)!) {
        const [, verb, word] = /^(?:(add|remove)\s+)?(.*)$/s.exec(text.trim())!;
        let ranges: readonly Range[];
        if (word!.startsWith("ipset:")) {
          if (!lists.has(word!)) throw entry.wrong(`ipset not found: ${JSON.stringify(word)}`);
          ranges = resolve(word!, entry).ranges;
        } else {
          ranges = this.setMember(word!, entry);
        }
        const isRemoval = verb === "remove";
        if (isRemoval !== step.isRemoval) {
          spend(set.ranges.length, entry);
          take();
          step = { isRemoval, ranges: [] };
        }
        spend(ranges.length, entry);
        for (const range of ranges) step.ranges.push(range);
      }
      take();
      open.delete(name);
      this.ipsets.set(name, set);
      return set;
    };
    for (const [name, , place] of entries) {
      if (!name.startsWith("ipset:") || name === "ipset:") {
        throw place.wrong(`ipsets[${JSON.stringify(name)}]: names of IP sets must start with "ipset:"`);
      }
      resolve(name, place);
    }
  }

  private setMember(word: string, entry: Value): readonly Range[] {
    const selector = at(entry, () => parseSelector(word, this));
    if (isAutogroup(selector, "internet")) return INTERNET.ranges;
    if (selector.kind === "range") return [selector.range];
    throw entry.wrong(`${JSON.stringify(word)} is no address, CIDR, host, IP set or autogroup:internet`);
  }

  private readPostures(): void {
    for (const [name, value, place] of this.definitions("postures")) {
      if (!name.startsWith("posture:") || name === "posture:") {
        throw place.wrong(`postures[${JSON.stringify(name)}]: names of postures must start with "posture:"`);
      }
      const conditions = value.strings(`postures[${JSON.stringify(name)}]`);
      this.postures.set(
        name,
        conditions.map(({ text, at: entry }) => at(entry, () => parseCondition(text))),
      );
    }
    this.defaultPostures = this.postureNames(this.sections.get("defaultSrcPosture"), "defaultSrcPosture");
  }

  private postureNames(value: Value | undefined, what: string): string[] {
    return (value?.strings(what) ?? []).map(({ text, at: place }) => {
      if (!this.postures.has(text)) throw place.wrong(`posture not found: ${JSON.stringify(text)}`);
      return text;
    });
  }

  private srcPosture(fields: Map<string, Value>): readonly string[] {
    const value = fields.get("srcPosture");
    return value && !value.isNull ? this.postureNames(value, "srcPosture") : this.defaultPostures;
  }

  private oneCGNAT(): boolean | null {
    const value = this.sections.get("OneCGNATRoute");
    if (!value) return null;
    const text = value.string("OneCGNATRoute");
    if (text === "") return null;
    if (text !== "mac-always" && text !== "mac-never")
      throw value.wrong(`OneCGNATRoute is "mac-always" or "mac-never"`);
    return text === "mac-always";
  }

  private derpMap(): Policy["derpMap"] {
    const section = this.sections.get("derpMap");
    if (!section || section.isNull) return null;
    const fields = fieldsOf(section, "derpMap", ["OmitDefaultRegions", "Regions", "HomeParams"]);
    const omitDefaultRegions = fields.get("OmitDefaultRegions")?.boolean("OmitDefaultRegions") ?? false;
    const [Regions, HomeParams] = ["Regions", "HomeParams"].map((name) => fields.get(name)?.plain() ?? undefined);
    const map = at(
      section,
      () => derpMapOf({ Regions: Regions ?? {}, HomeParams }),
      (message) => `derpMap: ${message}`,
    );
    if (omitDefaultRegions && !Object.values(map.Regions ?? {}).some((region) => region !== null))
      throw section.wrong("derpMap: OmitDefaultRegions without a region of its own leaves no relay");
    return { ...map, omitDefaultRegions };
  }

  // ---- rules ----

  private source(word: string, place: Value): Selector {
    const selector = at(
      place,
      () => parseSelector(word, this),
      (message) => `src=${message}`,
    );
    if (isAutogroup(selector, "self") || isAutogroup(selector, "internet")) {
      throw place.wrong(`${JSON.stringify(selector.text)} not valid on the src side of a rule`);
    }
    return selector;
  }

  private sources(value: Value | undefined): Selector[] {
    return (value?.strings("src") ?? []).map(({ text, at: place }) => this.source(text, place));
  }

  private destination(word: string, place: Value): Selector {
    const selector = at(
      place,
      () => parseSelector(word, this),
      (message) => `dst=${JSON.stringify(word)}: ${message}`,
    );
    if (isAutogroup(selector, "danger-all")) throw place.wrong("cannot use autogroup:danger-all as a dst");
    return selector;
  }

  private acl(entry: Value, index: number): Access {
    const names = ["action", "src", "dst", "proto", "users", "ports", "srcPosture"];
    const fields = fieldsOf(entry, `acls[${index}]`, names);
    const action = fields.get("action")?.string("action").trim() ?? "";
    if (action !== "accept")
      throw (fields.get("action") ?? entry).wrong(`action=${JSON.stringify(action)} is not supported`);
    const protoField = fields.get("proto");
    const protocol = protoField ? at(protoField, () => parseProtocol(protoField.word("proto").trim())) : null;
    const src = this.sources(fields.get("src") ?? fields.get("users"));
    const dst: Destination[] =
      (fields.get("dst") ?? fields.get("ports"))?.strings("dst").map(({ text, at: place }) => {
        const { host, ports } = at(
          place,
          () => splitPorts(text.trim()),
          (message) => `dst=${JSON.stringify(text.trim())}: ${message}`,
        );
        return { selector: this.destination(host, place), ports };
      }) ?? [];
    const self = dst.some(({ selector }) => isAutogroup(selector, "self"));
    if (self && !src.every((selector) => selector.kind === "any" || standsForUsers(selector)))
      throw entry.wrong(SELF_NEEDS_USERS);
    return {
      section: "acls",
      index,
      place: this.placeOf(entry),
      src,
      postures: this.srcPosture(fields),
      dst: dst.map(({ selector }) => selector),
      openings: [{ protocol, dst }],
      capabilities: null,
      via: [],
    };
  }

  private grant(entry: Value, index: number): Access {
    const names = ["src", "dst", "ip", "app", "via", "srcPosture"];
    const fields = fieldsOf(entry, `grants[${index}]`, names);
    const src = this.sources(fields.get("src"));
    const dst = (fields.get("dst")?.strings("dst") ?? []).map(({ text, at: place }) => {
      const selector = this.destination(text.trim(), place);
      // Only the older acls are full of it.
      if (selector.kind === "range" && isEverything(selector.range))
        throw place.wrong(
          `dst ${JSON.stringify(selector.text)}: to allow all IP addresses, use "*" or "autogroup:internet"`,
        );
      return selector;
    });
    const openings = new Map<number | null, Destination["ports"][number][]>();
    for (const { text, at: place } of fields.get("ip")?.strings("ip") ?? []) {
      const { protocol, ports } = at(place, () => parseOpening(text.trim().toLowerCase()));
      const ranges = openings.get(protocol);
      if (ranges) ranges.push(ports);
      else openings.set(protocol, [ports]);
    }
    const capabilities = this.capabilities(fields.get("app"));
    if (openings.size === 0 && Object.keys(capabilities).length === 0)
      throw entry.wrong("ip and app can not both be empty");
    const via = (fields.get("via")?.strings("via") ?? []).map(({ text, at: place }) => {
      if (!text.trim().startsWith("tag:")) throw place.wrong("via can only be a tag");
      return at(
        place,
        () => parseSelector(text, this),
        (message) => `via=${message}`,
      ).text;
    });
    if (dst.some((selector) => isAutogroup(selector, "self")) && !src.every(standsForUsers))
      throw entry.wrong(SELF_NEEDS_USERS);
    if (Object.keys(capabilities).length > 0 && dst.some((selector) => isAutogroup(selector, "internet"))) {
      throw entry.wrong("cannot use app grants with autogroup:internet");
    }
    return {
      section: "grants",
      index,
      place: this.placeOf(entry),
      src,
      postures: this.srcPosture(fields),
      dst,
      openings: [...openings].map(([protocol, ports]) => ({
        protocol,
        dst: dst.map((selector) => ({ selector, ports })),
      })),
      capabilities: Object.keys(capabilities).length > 0 ? capabilities : null,
      via,
    };
  }

  private capabilities(value: Value | undefined, open = false): Record<string, CapabilityValues> {
    const out: Record<string, CapabilityValues> = {};
    for (const [name, values, place] of value?.entries("app") ?? []) {
      if (!open && !OPEN_CAPABILITIES.has(name) && /^([^/]*\.)?tailscale\.com(\/|$)/i.test(name)) {
        throw place.wrong("capability name must not be in the tailscale.com domain");
      }
      if (name.includes("://") || !/^[^/\s]+\.[^/\s]+\/\S+$/.test(name)) {
        throw place.wrong("capability name must have the form {domain}/{path}");
      }
      Object.defineProperty(out, name, {
        value: values.isNull ? null : values.items(`app[${JSON.stringify(name)}]`).map((item) => item.plain()),
        enumerable: true,
      });
    }
    return out;
  }

  private placeOf(value: Value) {
    return placeAt(value.text, value.offset);
  }

  private approvers(): Policy["approvers"] {
    const section = this.sections.get("autoApprovers");
    if (!section) return { routes: [], exitNode: [] };
    const fields = fieldsOf(section, "autoApprovers", ["routes", "exitNode", "services"]);
    const approvers = (value: Value, what: string): Selector[] =>
      value.strings(what).map(({ text, at: place }) => {
        const selector = at(place, () => parseSelector(text, this));
        const fine = selector.kind === "tag" || standsForUsers(selector) || isAutogroup(selector, "tagged");
        if (!fine) throw place.wrong(`${what}: ${JSON.stringify(text)} is no user, group or tag`);
        return selector;
      });
    // There are no services here that anybody could advertise: the section is checked, and has nothing to approve.
    for (const [name, value, place] of fields.get("services")?.entries("autoApprovers.services") ?? []) {
      if (!/^(svc|tag):[a-zA-Z][a-zA-Z0-9-]*$/.test(name))
        throw place.wrong(`autoApprovers.services: ${JSON.stringify(name)} is no service like "svc:web", or tag`);
      approvers(value, `autoApprovers.services[${JSON.stringify(name)}]`);
    }
    const routes = (fields.get("routes")?.entries("autoApprovers.routes") ?? []).map(([prefix, value, place]) => {
      const range = prefix.includes("-") ? null : parseRange(prefix.trim());
      if (!range) throw place.wrong(`autoApprovers.routes: ${JSON.stringify(prefix)} is no CIDR`);
      return { range, approvers: approvers(value, `autoApprovers.routes[${JSON.stringify(prefix)}]`) };
    });
    const exitNode = fields.get("exitNode");
    return { routes, exitNode: exitNode ? approvers(exitNode, "autoApprovers.exitNode") : [] };
  }

  private nodeAttribute(entry: Value, index: number): NodeAttribute {
    const fields = fieldsOf(entry, "nodeAttrs", ["target", "attr", "app", "ipPool"]);
    const target = (fields.get("target")?.strings("target") ?? []).map(({ text, at: place }) => {
      const selector = at(place, () => parseSelector(text, this));
      if (["self", "internet", "danger-all"].some((name) => isAutogroup(selector, name))) {
        throw place.wrong(`${JSON.stringify(selector.text)} not valid as a target of nodeAttrs`);
      }
      return selector;
    });
    const attributes = (fields.get("attr")?.strings("attr") ?? []).map(({ text, at: place }) => {
      if (text.trim() === "") throw place.wrong("attr values cannot be empty");
      return text.trim();
    });
    const ipPool = (fields.get("ipPool")?.strings("ipPool") ?? []).map(({ text, at: place }) => {
      const range = parseRange(text.trim());
      if (!range || !TAILNET.overlaps(range))
        throw place.wrong(`ipPool: ${JSON.stringify(text)} is no part of the tailnet's addresses`);
      return range;
    });
    return {
      index,
      place: this.placeOf(entry),
      target,
      attributes,
      app: this.capabilities(fields.get("app"), true),
      ipPool,
    };
  }

  // ---- SSH ----

  private ssh(entry: Value, index: number): SSHEntry {
    const names = [
      "action",
      "src",
      "dst",
      "users",
      "checkPeriod",
      "acceptEnv",
      "recorder",
      "enforceRecorder",
      "srcPosture",
    ];
    const fields = fieldsOf(entry, `ssh[${index}]`, names);
    const actionField = fields.get("action");
    const action = actionField?.string("action").trim() ?? "";
    if (action === "") throw (actionField ?? entry).wrong("action must be specified");
    if (action !== "accept" && action !== "check")
      throw actionField!.wrong(`${JSON.stringify(action)} is not a valid action`);
    const src = (fields.get("src")?.strings("src") ?? []).map(({ text, at: place }) => {
      if (!isIdentity(text.trim())) throw place.wrong(`invalid src ${JSON.stringify(text.trim())}`);
      const selector = at(place, () => parseSelector(text, this));
      if (["self", "internet", "danger-all", "shared"].some((name) => isAutogroup(selector, name)))
        throw place.wrong(`${JSON.stringify(selector.text)} is not allowed in src`);
      if (action === "check" && (selector.kind === "tag" || isAutogroup(selector, "tagged")))
        throw place.wrong('"check" action does not support tags in src');
      return selector;
    });
    const dst = (fields.get("dst")?.strings("dst") ?? []).map(({ text, at: place }) => {
      const word = text.trim();
      if (!isIdentity(word)) throw place.wrong(`invalid dst ${JSON.stringify(word)}`);
      const selector = at(place, () => parseSelector(word, this));
      const role = ["member", "tagged", "self"].some((name) => isAutogroup(selector, name));
      if (selector.kind !== "user" && selector.kind !== "tag" && !role)
        throw place.wrong(`invalid dst ${JSON.stringify(word)}`);
      return { selector, place };
    });
    const { logins, localDomains } = this.logins(fields.get("users"), entry);
    for (const { selector, place } of dst) {
      if (isAutogroup(selector, "self") && !src.every(standsForUsers)) throw entry.wrong(SELF_NEEDS_USERS);
      const isOwn = (each: Selector) =>
        each.kind === "user" && selector.kind === "user" && each.token === selector.token;
      const tagged = src.some((each) => each.kind === "tag" || isAutogroup(each, "tagged"));
      if ((selector.kind === "user" && !src.every(isOwn)) || (isAutogroup(selector, "member") && tagged))
        throw place.wrong("users in dst are only allowed from the same user");
    }
    const environment = (fields.get("acceptEnv")?.strings("acceptEnv") ?? []).map(({ text, at: place }) => {
      if (text.trim() === "") throw place.wrong("acceptEnv values cannot be empty");
      return text;
    });
    return {
      index,
      place: this.placeOf(entry),
      action: action as "accept" | "check",
      src,
      postures: this.srcPosture(fields),
      dst: dst.map(({ selector }) => selector),
      logins,
      localDomains,
      checkPeriod: this.checkPeriod(fields.get("checkPeriod"), action),
      acceptEnv: environment,
      recorders: (fields.get("recorder")?.strings("recorder") ?? []).map(({ text, at: place }) => {
        const selector = at(place, () => parseSelector(text, this));
        if (selector.kind !== "tag") throw place.wrong(`recorder ${JSON.stringify(text)} must be a tag`);
        return selector.name;
      }),
      enforceRecorder: fields.get("enforceRecorder")?.boolean("enforceRecorder") ?? false,
    };
  }

  private logins(value: Value | undefined, entry: Value): { logins: string[]; localDomains: string[] } {
    const users = value?.strings("users") ?? [];
    if (users.length === 0) throw (value ?? entry).wrong("users must be specified");
    const logins: string[] = [];
    const localDomains: string[] = [];
    for (const { text, at: place } of users) {
      const login = text.trim();
      if (login === "" || login === "*") throw place.wrong(`user ${JSON.stringify(login)} is not valid`);
      // Words that only look like more are literal logins, as in the hosted service.
      const domain = /^localpart:\*@(.+)$/.exec(login)?.[1];
      if (domain === undefined) logins.push(login);
      else localDomains.push(domain.toLowerCase());
    }
    return { logins, localDomains };
  }

  private checkPeriod(value: Value | undefined, action: string): number | null {
    const text = value?.string("checkPeriod") ?? "";
    if (!value || text === "") return null;
    const period = text === "always" ? 0 : at(value, () => parseDuration(text));
    if (period < 0 || (period === 0 && text !== "always")) {
      throw value.wrong(`checkPeriod ${formatDuration(period)} must be a positive duration`);
    }
    if (period > MAX_CHECK_PERIOD) throw value.wrong(`checkPeriod ${formatDuration(period)} is above the max (168h)`);
    return action === "check" ? period : null;
  }

  // ---- tests: what they name is judged when they run, as in the hosted service ----

  private test(entry: Value): PolicyTest {
    const names = ["src", "accept", "deny", "proto", "user", "allow", "srcPostureAttrs"];
    const fields = fieldsOf(entry, "tests", names);
    const words = (...keys: string[]): string[] =>
      keys.flatMap((key) => fields.get(key)?.strings(key) ?? []).map(({ text }) => text);
    const attributes: Record<string, string | number | boolean> = {};
    for (const [name, value, place] of fields.get("srcPostureAttrs")?.entries("srcPostureAttrs") ?? []) {
      const plain = value.plain();
      if (!/^[a-zA-Z]+:[a-zA-Z0-9_]{1,64}$/.test(name))
        throw place.wrong(`srcPostureAttrs: ${JSON.stringify(name)} is no attribute: write one like "node:os"`);
      if (typeof plain !== "string" && typeof plain !== "number" && typeof plain !== "boolean")
        throw value.wrong(`srcPostureAttrs[${JSON.stringify(name)}] must be a string, a number, true or false`);
      attributes[name] = plain;
    }
    return {
      srcPostureAttrs: attributes,
      src: (fields.get("src") ?? fields.get("user"))?.string("src") ?? "",
      accept: words("accept", "allow"),
      deny: words("deny"),
      proto: fields.get("proto")?.word("proto") ?? "",
    };
  }

  private sshTest(entry: Value): SSHTest {
    const fields = fieldsOf(entry, "sshTests", ["src", "dst", "accept", "check", "deny"]);
    const words = (key: string): string[] => (fields.get(key)?.strings(key) ?? []).map(({ text }) => text.trim());
    const src = fields.get("src")?.string("src").trim() ?? "";
    const allow = (side: string, word: string, at: Value): void => {
      if (word === "*" || word.startsWith("autogroup:"))
        throw at.wrong(`SSH tests ${side} contains disallowed element ${JSON.stringify(word)}`);
    };
    if (src !== "") allow("src", src, fields.get("src")!);
    for (const { text, at: place } of fields.get("dst")?.strings("dst") ?? []) allow("dst", text.trim(), place);
    return {
      src,
      dst: words("dst"),
      accept: words("accept"),
      check: words("check"),
      deny: words("deny"),
    };
  }
}

/** Whether a word may stand in an SSH rule: for who somebody is, not for an address. */
function isIdentity(word: string): boolean {
  return /^(tag|group|autogroup):/.test(word) || word.includes("@");
}

export function isAutogroup(selector: Selector, name: string): boolean {
  return selector.kind === "autogroup" && selector.name === `autogroup:${name}`;
}

const SECTIONS = [
  "groups",
  "hosts",
  "tagOwners",
  "ipsets",
  "postures",
  "defaultSrcPosture",
  "acls",
  "grants",
  "autoApprovers",
  "nodeAttrs",
  "ssh",
  "tests",
  "sshTests",
  "randomizeClientPort",
  "disableIPv4",
  "OneCGNATRoute",
  "derpMap",
];

/**
 * Reads a policy. Throws PolicyError. `isForeignGroup`: whether a "group:…" that the policy does not define may be one of an
 * identity provider; without it, each must be defined.
 */
export function parsePolicy(text: string, isForeignGroup: (name: string) => boolean = () => false): Policy {
  const root = parseHuJSON(text);
  const sections = new Map<string, Value>();
  for (const [key, value, place] of root?.entries("the policy") ?? []) {
    if (key.startsWith("#")) continue;
    const refused = REFUSED[key.toLowerCase()];
    if (refused !== undefined) throw place.wrong(refused);
    const name = SECTIONS.find((each) => each.toLowerCase() === key.toLowerCase());
    if (name === undefined) throw place.wrong(`json: unknown field ${JSON.stringify(key)}`);
    if (sections.has(name)) throw place.wrong(`the section "${name}" stands twice in the policy`);
    sections.set(name, value);
  }
  return new Parser(sections, isForeignGroup).policy(text);
}
