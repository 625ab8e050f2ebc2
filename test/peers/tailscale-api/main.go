// Drives a server through Tailscale's official Go client, the way that the Terraform provider and the Kubernetes operator
// do. Each step is a line of JSON on standard output: {"step", "value", "error", "status"}.
//
// usage: apiclient BASE-URL terraform API-KEY | operator CLIENT-ID CLIENT-SECRET
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"time"

	"tailscale.com/client/tailscale/v2"
)

var ctx = context.Background()

func report(step string, value any, err error) {
	line := map[string]any{"step": step, "value": value}
	if err != nil {
		line["error"] = err.Error()
		var api tailscale.APIError
		if errors.As(err, &api) {
			line["status"] = api.Status
			line["data"] = api.Data
		}
	}
	out, _ := json.Marshal(line)
	fmt.Println(string(out))
}

func main() {
	if len(os.Args) < 4 {
		fmt.Fprintln(os.Stderr, "usage: apiclient BASE-URL terraform API-KEY | operator CLIENT-ID CLIENT-SECRET")
		os.Exit(2)
	}
	base, err := url.Parse(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	switch os.Args[2] {
	case "terraform":
		terraform(&tailscale.Client{BaseURL: base, APIKey: os.Args[3]})
	case "operator":
		operator(&tailscale.Client{BaseURL: base, Auth: &tailscale.OAuth{ClientID: os.Args[3], ClientSecret: os.Args[4]}})
	}
}

const policy = `{
	// Kept as it is written.
	"tagOwners": {"tag:web": []},
	"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
}`

const failing = `{"acls": [], "tests": [{"src": "100.64.0.1", "accept": ["100.64.0.2:22"]}]}`

// The calls of the provider's resources and data sources, each in the order of create, read, update, delete.
func terraform(c *tailscale.Client) {
	acl := c.PolicyFile()
	report("acl.validate", nil, acl.Validate(ctx, policy))
	report("acl.validate failing", nil, acl.Validate(ctx, failing))
	report("acl.create over another", nil, acl.Set(ctx, policy, "0000"))
	report("acl.create", nil, acl.Set(ctx, policy, "ts-default"))
	report("acl.create again", nil, acl.Set(ctx, failing, "ts-default"))
	raw, err := acl.Raw(ctx)
	report("acl.read", raw, err)
	parsed, err := acl.Get(ctx)
	report("acl.data", parsed, err)
	report("acl.update failing", nil, acl.Set(ctx, failing, ""))
	set, err := acl.SetAndGet(ctx, tailscale.ACL{
		TagOwners: map[string][]string{"tag:web": {}},
		ACLs:      []tailscale.ACLEntry{{Action: "accept", Source: []string{"*"}, Destination: []string{"*:*"}}},
	}, parsed.ETag)
	report("acl.update", set, err)

	var request tailscale.CreateKeyRequest
	request.Capabilities.Devices.Create.Reusable = true
	request.Capabilities.Devices.Create.Preauthorized = true
	request.Capabilities.Devices.Create.Tags = []string{"tag:web"}
	request.ExpirySeconds = 3600
	request.Description = "made by terraform"
	key, err := c.Keys().CreateAuthKey(ctx, request)
	report("tailnet_key.create", key, err)
	if key != nil {
		read, err := c.Keys().Get(ctx, key.ID)
		report("tailnet_key.read", read, err)
		report("tailnet_key.delete", nil, c.Keys().Delete(ctx, key.ID))
		read, err = c.Keys().Get(ctx, key.ID)
		report("tailnet_key.read deleted", read, err)
	}

	devices := c.Devices()
	list, err := devices.List(ctx, tailscale.WithFields(tailscale.IncludeFieldsAll))
	report("devices", list, err)
	list, err = devices.List(ctx, tailscale.WithFilter("hostname", []string{"web"}))
	report("device by hostname", list, err)
	id := "1"
	get := func(step string) {
		device, err := devices.Get(ctx, id)
		report(step, device, err)
	}
	report("device_authorization.update", nil, devices.SetAuthorized(ctx, id, true))
	report("device_key.create", nil, devices.SetKey(ctx, id, tailscale.DeviceKey{KeyExpiryDisabled: false}))
	get("device_key.read")
	report("device_key.delete", nil, devices.SetKey(ctx, id, tailscale.DeviceKey{KeyExpiryDisabled: true}))
	report("device_subnet_routes.create", nil, devices.SetSubnetRoutes(ctx, id, []string{"10.0.0.0/8"}))
	routes, err := devices.SubnetRoutes(ctx, id)
	report("device_subnet_routes.read", routes, err)
	report("device_subnet_routes.delete", nil, devices.SetSubnetRoutes(ctx, id, []string{}))
	report("device_tags.create", nil, devices.SetTags(ctx, id, []string{"tag:web"}))
	get("device_tags.read")
	report("device_tags.delete", nil, devices.SetTags(ctx, id, []string{}))
	report("device.name", nil, devices.SetName(ctx, id, "front"))
	report("device.ip", nil, devices.SetIPv4Address(ctx, id, "100.64.0.77"))
	report("device.attribute", nil, devices.SetPostureAttribute(ctx, id, "custom:tier", tailscale.DevicePostureAttributeRequest{Value: "prod"}))
	report("device.attribute for a time", nil, devices.SetPostureAttribute(ctx, id, "custom:oncall", tailscale.DevicePostureAttributeRequest{
		Value: true, Expiry: tailscale.Time{Time: time.Now().Add(time.Hour)},
	}))
	attributes, err := devices.GetPostureAttributes(ctx, id)
	report("device.attributes", attributes, err)
	report("device.attribute deleted", nil, devices.DeletePostureAttribute(ctx, id, "custom:tier"))
	get("device")
	_, err = devices.Get(ctx, "99")
	report("device absent", tailscale.IsNotFound(err), err)

	dns := c.DNS()
	servers, err := dns.Nameservers(ctx)
	report("dns_nameservers.read", servers, err)
	report("dns_nameservers.create", nil, dns.SetNameservers(ctx, servers))
	report("dns_nameservers.update", nil, dns.SetNameservers(ctx, []string{"192.0.2.53"}))
	servers, err = dns.Nameservers(ctx)
	report("dns_nameservers.read updated", servers, err)
	report("dns_nameservers.wrong", nil, dns.SetNameservers(ctx, []string{"nowhere"}))
	report("dns_nameservers.delete", nil, dns.SetNameservers(ctx, []string{}))
	preferences, err := dns.Preferences(ctx)
	report("dns_preferences.read", preferences, err)
	report("dns_preferences.delete", nil, dns.SetPreferences(ctx, tailscale.DNSPreferences{}))
	preferences, err = dns.Preferences(ctx)
	report("dns_preferences.read deleted", preferences, err)
	paths, err := dns.SearchPaths(ctx)
	report("dns_search_paths.read", paths, err)
	report("dns_search_paths.update", nil, dns.SetSearchPaths(ctx, []string{"dev.test", "corp.test"}))
	paths, err = dns.SearchPaths(ctx)
	report("dns_search_paths.read updated", paths, err)
	split, err := dns.SplitDNS(ctx)
	report("dns_split_nameservers.read", split, err)
	split, err = dns.UpdateSplitDNS(ctx, tailscale.SplitDNSRequest{"dev.test": {"10.1.0.53"}})
	report("dns_split_nameservers.create", split, err)
	split, err = dns.UpdateSplitDNS(ctx, tailscale.SplitDNSRequest{"corp.test": nil})
	report("dns_split_nameservers.delete", split, err)
	report("dns_split_nameservers.replace", nil, dns.SetSplitDNS(ctx, tailscale.SplitDNSRequest{"a.test": {"10.2.0.53"}}))
	report("dns_configuration.create", nil, dns.SetConfiguration(ctx, tailscale.DNSConfiguration{
		Nameservers: []tailscale.DNSConfigurationResolver{{Address: "9.9.9.9"}, {Address: "1.1.1.1", UseWithExitNode: true}},
		SearchPaths: []string{"b.test"},
		Preferences: tailscale.DNSConfigurationPreferences{OverrideLocalDNS: true, MagicDNS: true},
	}))
	whole, err := dns.Configuration(ctx)
	report("dns_configuration.read", whole, err)
	report("dns_configuration.delete", nil, dns.SetConfiguration(ctx, tailscale.DNSConfiguration{}))

	report("tailnet_settings.create", nil, c.TailnetSettings().Update(ctx, tailscale.UpdateTailnetSettingsRequest{
		DevicesApprovalOn:      tailscale.PointerTo(true),
		DevicesKeyDurationDays: tailscale.PointerTo(90),
		NetworkFlowLoggingOn:   tailscale.PointerTo(false),
	}))
	settings, err := c.TailnetSettings().Get(ctx)
	report("tailnet_settings.read", settings, err)
	report("tailnet_settings.absent", nil, c.TailnetSettings().Update(ctx, tailscale.UpdateTailnetSettingsRequest{
		NetworkFlowLoggingOn: tailscale.PointerTo(true),
	}))
	users, err := c.Users().List(ctx, nil, nil)
	report("users", users, err)
	user, err := c.Users().Get(ctx, "1")
	report("user", user, err)

	client, err := c.Keys().CreateOAuthClient(ctx, tailscale.CreateOAuthClientRequest{Scopes: []string{"users:read"}, Description: "ui"})
	report("oauth_client.create", client, err)
	if client != nil {
		next, err := c.Keys().SetOAuthClient(ctx, client.ID, tailscale.SetOAuthClientRequest{
			Scopes: []string{"auth_keys"}, Tags: []string{"tag:web"}, Description: "ci",
		})
		report("oauth_client.update", next, err)
		next, err = c.Keys().Get(ctx, client.ID)
		report("oauth_client.read", next, err)
		keys, err := c.Keys().List(ctx, true)
		report("keys", keys, err)
		report("oauth_client.delete", nil, c.Keys().Delete(ctx, client.ID))
		_, err = c.Keys().Get(ctx, client.ID)
		report("oauth_client.read deleted", tailscale.IsNotFound(err), err)
	}
	hook, err := c.Webhooks().Create(ctx, tailscale.CreateWebhookRequest{
		EndpointURL:   "http://127.0.0.1:9/hook",
		Subscriptions: []tailscale.WebhookSubscriptionType{tailscale.WebhookNodeCreated, tailscale.WebhookSubnetIPForwardingNotEnabled},
	})
	report("webhook.create", hook, err)
	if hook != nil {
		next, err := c.Webhooks().Update(ctx, hook.EndpointID, []tailscale.WebhookSubscriptionType{tailscale.WebhookPolicyUpdate})
		report("webhook.update", next, err)
		next, err = c.Webhooks().Get(ctx, hook.EndpointID)
		report("webhook.read", next, err)
		next, err = c.Webhooks().RotateSecret(ctx, hook.EndpointID)
		report("webhook.rotate", next, err)
		hooks, err := c.Webhooks().List(ctx)
		report("webhooks", hooks, err)
		report("webhook.delete", nil, c.Webhooks().Delete(ctx, hook.EndpointID))
	}
	report("contacts.update", nil, c.Contacts().Update(ctx, tailscale.ContactSecurity, tailscale.UpdateContactRequest{Email: tailscale.PointerTo("sec@example.com")}))
	contacts, err := c.Contacts().Get(ctx)
	report("contacts.read", contacts, err)
	_, err = c.Logging().LogstreamConfiguration(ctx, tailscale.LogTypeConfig)
	report("logstream", nil, err)
	report("acl.delete", nil, acl.Set(ctx, "", ""))
	raw, err = acl.Raw(ctx)
	report("acl.read deleted", raw, err)
}

// What the Kubernetes operator does for a proxy: a token by client credentials, a key with the proxy's tags, the device
// that joins with it, and its end.
func operator(c *tailscale.Client) {
	var request tailscale.CreateKeyRequest
	request.Capabilities.Devices.Create.Preauthorized = true
	request.Capabilities.Devices.Create.Tags = []string{"tag:k8s"}
	key, err := c.Keys().CreateAuthKey(ctx, request)
	report("key", key, err)
	request.Capabilities.Devices.Create.Tags = []string{"tag:other"}
	_, err = c.Keys().CreateAuthKey(ctx, request)
	report("key of others", nil, err)
	// The proxy joins in the meantime.
	var found []tailscale.Device
	for deadline := time.Now().Add(20 * time.Second); len(found) == 0 && time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		var listErr error
		found, listErr = c.Devices().List(ctx, tailscale.WithFilter("tags", []string{"tag:k8s"}))
		if listErr != nil {
			report("devices", nil, listErr)
			return
		}
	}
	report("devices", found, nil)
	for _, device := range found {
		got, err := c.Devices().Get(ctx, device.NodeID)
		report("device", got, err)
		report("delete", nil, c.Devices().Delete(ctx, device.NodeID))
		_, err = c.Devices().Get(ctx, device.NodeID)
		report("device deleted", tailscale.IsNotFound(err), err)
		// As the operator cleans up: what is gone already is no problem to it.
		err = c.Devices().Delete(ctx, device.NodeID)
		report("delete again", tailscale.IsNotFound(err), err)
	}
	_, err = c.Users().List(ctx, nil, nil)
	report("users", nil, err)
}
