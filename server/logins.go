package server

import (
	"slices"
	"strings"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// logins are what the ssh bootstrap needs on a node: one for each pool that logs into its
// guests and has a VM there that lives.
func logins(vms []*fleet.VM, pools map[fleet.PoolName]*fleet.Pool) []api.PoolLogin {
	var found []api.PoolLogin
	for _, vm := range vms {
		pool := pools[vm.Pool]
		if pool == nil || pool.Bootstrap != fleet.BootstrapSSH || vm.State.Final() {
			continue
		}
		if slices.ContainsFunc(found, func(l api.PoolLogin) bool { return l.Pool == pool.Name }) {
			continue
		}
		login := fleet.StockLogin
		if pool.SSH != nil {
			login = *pool.SSH
		}
		found = append(found, api.PoolLogin{Pool: pool.Name, User: login.User, Password: login.Password, Key: login.Key})
	}
	slices.SortFunc(found, func(a, b api.PoolLogin) int { return strings.Compare(string(a.Pool), string(b.Pool)) })
	return found
}

// withoutSecrets are logins as they may be hashed.
func withoutSecrets(all []api.PoolLogin) []api.PoolLogin {
	all = slices.Clone(all)
	for i := range all {
		all[i].Password, all[i].Key = "", ""
	}
	return all
}
