package config

import (
	"fmt"

	"github.com/paddock-ci/paddock/fleet"
)

// FleetPools are the pools as the other packages speak of them.
func (c *Config) FleetPools() []fleet.Pool {
	pools := make([]fleet.Pool, 0, len(c.Pools))
	for _, p := range c.Pools {
		pools = append(pools, p.pool())
	}
	return pools
}

func (p *Pool) pool() fleet.Pool {
	out := fleet.Pool{
		Name: fleet.PoolName(p.Name), Labels: fleet.NewLabels(p.Labels...),
		MatchHosted: p.MatchHosted, PublicRepositories: p.PublicRepositories,
		Image: p.Image, CPU: p.CPU, Memory: int64(p.Memory), Disk: int64(p.Disk), Growth: int64(p.Growth),
		Env: p.Env, MinIdle: p.MinIdle, Max: p.Max, MaxPerRepository: p.MaxPerRepository,
		Priority: p.Priority, Group: p.Group, Bootstrap: fleet.Bootstrap(p.Bootstrap), Runner: p.Runner,
		Nodes: fleet.Selector{Tags: p.NodeTags},
		Deadlines: fleet.Deadlines{
			Boot: p.Deadlines.Boot.Duration(), Warm: p.Deadlines.Warm.Duration(),
			Registered: p.Deadlines.Registered.Duration(), Life: p.Deadlines.Life.Duration(),
		},
		SSH: p.login,
	}
	for _, s := range p.Scopes {
		out.Scopes = append(out.Scopes, fleet.Scope(s))
	}
	for _, n := range p.Nodes {
		out.Nodes.Names = append(out.Nodes.Names, fleet.NodeID(n))
	}
	for _, m := range p.Mounts {
		out.Mounts = append(out.Mounts, fleet.Mount{Name: m.Name, Path: m.Path, ReadOnly: m.ReadOnly})
	}
	return out
}

// ReadLogins reads the secrets by which the ssh bootstrap logs in; FleetPools then has
// them.
func (c *Config) ReadLogins() error {
	for i := range c.Pools {
		p := &c.Pools[i]
		if p.SSH == (SSH{}) {
			continue
		}
		login := &fleet.Login{User: p.SSH.User}
		for file, field := range map[string]*string{p.SSH.PasswordFile: &login.Password, p.SSH.KeyFile: &login.Key} {
			if file == "" {
				continue
			}
			secret, err := ReadSecret(file)
			if err != nil {
				return fmt.Errorf("pool %q: ssh: %w", p.Name, err)
			}
			*field = string(secret)
		}
		p.login = login
	}
	return nil
}
