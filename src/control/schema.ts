// Tables of the control server and the migrations that make them. Keys and addresses are text as clients write them,
// lists and Hostinfo are JSON, times are milliseconds since 1970, booleans are 0 and 1.
import { type Kysely, sql } from "kysely";
import type { Migration } from "kysely/migration";

export type Dialect = "sqlite" | "postgres";

export interface UsersTable {
  id: number;
  name: string;
  display_name: string;
  email: string;
  profile_pic_url: string;
  provider: string;
  provider_id: string;
  groups: string;
  role: string;
  status: string;
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
  description: string;
  preauthorized: number;
  expiration: number | null;
  revoked_at: number | null;
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
  /** Null where the tailnet has no addresses of the family. */
  ipv4: string | null;
  ipv6: string | null;
  endpoints: string;
  hostinfo: string;
  home_derp: number;
  cap: number;
  ephemeral: number;
  register_method: string;
  authorized: number;
  approved_routes: string;
  attributes: string;
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

/** Small collections: one JSON value each. */
export interface DocumentsTable {
  kind: string;
  id: string;
  value: string;
}

export interface Tables {
  users: UsersTable;
  pre_auth_keys: PreAuthKeysTable;
  nodes: NodesTable;
  counters: CountersTable;
  documents: DocumentsTable;
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

/**
 * A user of an identity provider may have the name of another: only name and provider together are unique. SQLite cannot
 * drop a constraint, so there the table is made anew (foreign keys are off during migrations).
 */
const usersOfProviders: Record<Dialect, (db: Kysely<unknown>) => Promise<void>> = {
  sqlite: async (db) => {
    await db.schema
      .createTable("users_new")
      .addColumn("id", "integer", (column) => column.primaryKey())
      .addColumn("name", "text", (column) => column.notNull())
      .addColumn("display_name", "text", (column) => column.notNull())
      .addColumn("email", "text", (column) => column.notNull())
      .addColumn("profile_pic_url", "text", (column) => column.notNull())
      .addColumn("provider", "text", (column) => column.notNull().defaultTo(""))
      .addColumn("provider_id", "text", (column) => column.notNull().defaultTo(""))
      .addColumn("groups", "text", (column) => column.notNull().defaultTo("[]"))
      .addColumn("created_at", "bigint", (column) => column.notNull())
      .addUniqueConstraint("users_name_provider", ["name", "provider_id"])
      .execute();
    await sql`insert into users_new (id, name, display_name, email, profile_pic_url, created_at)
      select id, name, display_name, email, profile_pic_url, created_at from users`.execute(db);
    await db.schema.dropTable("users").execute();
    await db.schema.alterTable("users_new").renameTo("users").execute();
  },
  postgres: async (db) => {
    const users = db.schema.alterTable("users");
    await users.dropConstraint("users_name_key").execute();
    await users.addColumn("provider", "text", (column) => column.notNull().defaultTo("")).execute();
    await users.addColumn("provider_id", "text", (column) => column.notNull().defaultTo("")).execute();
    await users.addColumn("groups", "text", (column) => column.notNull().defaultTo("[]")).execute();
    await users.addUniqueConstraint("users_name_provider", ["name", "provider_id"]).execute();
  },
};

/** Identity providers, approval of nodes and routes, and the small collections. */
const whole = (dialect: Dialect): Migration => ({
  async up(db: Kysely<unknown>): Promise<void> {
    await usersOfProviders[dialect](db);
    const keys = db.schema.alterTable("pre_auth_keys");
    await keys.addColumn("description", "text", (column) => column.notNull().defaultTo("")).execute();
    await keys.addColumn("preauthorized", "integer", (column) => column.notNull().defaultTo(0)).execute();
    await keys.addColumn("revoked_at", "bigint").execute();
    const nodes = db.schema.alterTable("nodes");
    await nodes.addColumn("authorized", "integer", (column) => column.notNull().defaultTo(1)).execute();
    await nodes.addColumn("approved_routes", "text", (column) => column.notNull().defaultTo("[]")).execute();
    await nodes.addColumn("attributes", "text", (column) => column.notNull().defaultTo("{}")).execute();
    await db.schema
      .createTable("documents")
      .addColumn("kind", "text", (column) => column.notNull())
      .addColumn("id", "text", (column) => column.notNull())
      .addColumn("value", "text", (column) => column.notNull())
      .addPrimaryKeyConstraint("documents_key", ["kind", "id"])
      .execute();
  },
});

const roles: Migration = {
  async up(db: Kysely<unknown>): Promise<void> {
    const users = db.schema.alterTable("users");
    await users.addColumn("role", "text", (column) => column.notNull().defaultTo("member")).execute();
  },
};

const suspension: Migration = {
  async up(db: Kysely<unknown>): Promise<void> {
    const users = db.schema.alterTable("users");
    await users.addColumn("status", "text", (column) => column.notNull().defaultTo("active")).execute();
  },
};

const NODE_COLUMNS = [
  ...["id", "machine_key", "node_key", "disco_key", "user_id", "tags", "hostname", "given_name", "name_from_host"],
  ...["ipv4", "ipv6", "endpoints", "hostinfo", "home_derp", "cap", "ephemeral", "register_method", "authorized"],
  ...["approved_routes", "attributes", "auth_key_id", "expiry", "created_at", "last_seen"],
];

/** Of a family that the tailnet does not have, any number of nodes have no address. SQLite: the table is made anew. */
const oneFamily: Record<Dialect, (db: Kysely<unknown>) => Promise<void>> = {
  sqlite: async (db) => {
    await db.schema
      .createTable("nodes_new")
      .addColumn("id", "integer", (column) => column.primaryKey())
      .addColumn("machine_key", "text", (column) => column.notNull())
      .addColumn("node_key", "text", (column) => column.notNull().unique())
      .addColumn("disco_key", "text", (column) => column.notNull())
      .addColumn("user_id", "integer", (column) => column.references("users.id"))
      .addColumn("tags", "text", (column) => column.notNull())
      .addColumn("hostname", "text", (column) => column.notNull())
      .addColumn("given_name", "text", (column) => column.notNull().unique())
      .addColumn("name_from_host", "integer", (column) => column.notNull())
      .addColumn("ipv4", "text", (column) => column.unique())
      .addColumn("ipv6", "text", (column) => column.unique())
      .addColumn("endpoints", "text", (column) => column.notNull())
      .addColumn("hostinfo", "text", (column) => column.notNull())
      .addColumn("home_derp", "integer", (column) => column.notNull())
      .addColumn("cap", "integer", (column) => column.notNull())
      .addColumn("ephemeral", "integer", (column) => column.notNull())
      .addColumn("register_method", "text", (column) => column.notNull())
      .addColumn("authorized", "integer", (column) => column.notNull().defaultTo(1))
      .addColumn("approved_routes", "text", (column) => column.notNull().defaultTo("[]"))
      .addColumn("attributes", "text", (column) => column.notNull().defaultTo("{}"))
      .addColumn("auth_key_id", "integer", (column) => column.references("pre_auth_keys.id").onDelete("set null"))
      .addColumn("expiry", "bigint")
      .addColumn("created_at", "bigint", (column) => column.notNull())
      .addColumn("last_seen", "bigint")
      .execute();
    const columns = sql.join(NODE_COLUMNS.map((name) => sql.ref(name)));
    await sql`insert into nodes_new (${columns}) select ${columns} from nodes`.execute(db);
    await db.schema.dropTable("nodes").execute();
    await db.schema.alterTable("nodes_new").renameTo("nodes").execute();
  },
  postgres: async (db) => {
    for (const column of ["ipv4", "ipv6"])
      await db.schema
        .alterTable("nodes")
        .alterColumn(column, (alter) => alter.dropNotNull())
        .execute();
  },
};

const absentAddresses = (dialect: Dialect): Migration => ({
  async up(db: Kysely<unknown>): Promise<void> {
    await oneFamily[dialect](db);
    for (const column of ["ipv4", "ipv6"])
      await sql`update nodes set ${sql.ref(column)} = null where ${sql.ref(column)} = ''`.execute(db);
  },
});

/** By name, in the order in which they run. Names never change and none is taken away. */
export const migrationsOf = (dialect: Dialect): Record<string, Migration> => ({
  "0001-foundation": foundation,
  "0002-whole": whole(dialect),
  "0003-roles": roles,
  "0004-suspension": suspension,
  "0005-one-family": absentAddresses(dialect),
});
