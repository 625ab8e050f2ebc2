// Tables of the control server and the migrations that make them. Keys and addresses are text as clients write them,
// lists and Hostinfo are JSON, times are milliseconds since 1970, booleans are 0 and 1.
import type { Kysely } from "kysely";
import type { Migration } from "kysely/migration";

export interface UsersTable {
  id: number;
  name: string;
  display_name: string;
  email: string;
  profile_pic_url: string;
  created_at: number;
}

export interface PreAuthKeysTable {
  id: number;
  prefix: string;
  hash: string;
  user_id: number | null;
  reusable: number;
  ephemeral: number;
  used: number;
  tags: string;
  expiration: number | null;
  created_at: number;
}

export interface NodesTable {
  id: number;
  machine_key: string;
  node_key: string;
  disco_key: string;
  user_id: number | null;
  tags: string;
  hostname: string;
  given_name: string;
  name_from_host: number;
  ipv4: string;
  ipv6: string;
  endpoints: string;
  hostinfo: string;
  home_derp: number;
  cap: number;
  ephemeral: number;
  register_method: string;
  auth_key_id: number | null;
  expiry: number | null;
  created_at: number;
  last_seen: number | null;
}

/** High-water marks of ids and addresses. */
export interface CountersTable {
  name: string;
  value: string;
}

export interface Tables {
  users: UsersTable;
  pre_auth_keys: PreAuthKeysTable;
  nodes: NodesTable;
  counters: CountersTable;
}

const foundation: Migration = {
  async up(db: Kysely<unknown>): Promise<void> {
    await db.schema
      .createTable("users")
      .addColumn("id", "integer", (column) => column.primaryKey())
      .addColumn("name", "text", (column) => column.notNull().unique())
      .addColumn("display_name", "text", (column) => column.notNull())
      .addColumn("email", "text", (column) => column.notNull())
      .addColumn("profile_pic_url", "text", (column) => column.notNull())
      .addColumn("created_at", "bigint", (column) => column.notNull())
      .execute();
    await db.schema
      .createTable("pre_auth_keys")
      .addColumn("id", "integer", (column) => column.primaryKey())
      .addColumn("prefix", "text", (column) => column.notNull().unique())
      .addColumn("hash", "text", (column) => column.notNull())
      .addColumn("user_id", "integer", (column) => column.references("users.id"))
      .addColumn("reusable", "integer", (column) => column.notNull())
      .addColumn("ephemeral", "integer", (column) => column.notNull())
      .addColumn("used", "integer", (column) => column.notNull())
      .addColumn("tags", "text", (column) => column.notNull())
      .addColumn("expiration", "bigint")
      .addColumn("created_at", "bigint", (column) => column.notNull())
      .execute();
    await db.schema
      .createTable("nodes")
      .addColumn("id", "integer", (column) => column.primaryKey())
      .addColumn("machine_key", "text", (column) => column.notNull())
      .addColumn("node_key", "text", (column) => column.notNull().unique())
      .addColumn("disco_key", "text", (column) => column.notNull())
      .addColumn("user_id", "integer", (column) => column.references("users.id"))
      .addColumn("tags", "text", (column) => column.notNull())
      .addColumn("hostname", "text", (column) => column.notNull())
      .addColumn("given_name", "text", (column) => column.notNull().unique())
      .addColumn("name_from_host", "integer", (column) => column.notNull())
      .addColumn("ipv4", "text", (column) => column.notNull().unique())
      .addColumn("ipv6", "text", (column) => column.notNull().unique())
      .addColumn("endpoints", "text", (column) => column.notNull())
      .addColumn("hostinfo", "text", (column) => column.notNull())
      .addColumn("home_derp", "integer", (column) => column.notNull())
      .addColumn("cap", "integer", (column) => column.notNull())
      .addColumn("ephemeral", "integer", (column) => column.notNull())
      .addColumn("register_method", "text", (column) => column.notNull())
      .addColumn("auth_key_id", "integer", (column) => column.references("pre_auth_keys.id").onDelete("set null"))
      .addColumn("expiry", "bigint")
      .addColumn("created_at", "bigint", (column) => column.notNull())
      .addColumn("last_seen", "bigint")
      .execute();
    await db.schema
      .createTable("counters")
      .addColumn("name", "text", (column) => column.primaryKey())
      .addColumn("value", "text", (column) => column.notNull())
      .execute();
  },
};

/** By name, in the order in which they run. Names never change and none is taken away. */
export const migrations: Record<string, Migration> = {
  "0001-foundation": foundation,
};
