package vm

import "os"

// ChildEnv is the environment for a process that we start: the names that programs need
// to find their way, and extra. The rest of ours may hold secrets and stays here.
func ChildEnv(extra ...string) []string {
	var env []string
	for _, name := range []string{"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TMPDIR", "TZ"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return append(env, extra...)
}
