package testrunner

import (
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// maxConfig bounds a JIT config; a real one is 4 KB.
const maxConfig = 1 << 20

// files are the three files of a configured runner, as far as they are used here.
type files struct {
	runner struct {
		AgentName   string
		ServerURLV2 string `json:"ServerUrlV2"`
	}
	credentials struct {
		Data struct {
			ClientID         string `json:"ClientId"`
			AuthorizationURL string `json:"AuthorizationUrl"`
		}
	}
	key *rsa.PrivateKey
}

// Unpack decodes a JIT config into the files that it stands for, by name: a runner that
// finds them in its directory needs no argument.
func Unpack(jit string) (map[string][]byte, error) {
	whole, err := base64.StdEncoding.DecodeString(jit)
	if err != nil {
		return nil, errors.New("JIT config: it is not base64")
	}
	var content map[string][]byte
	if err := json.Unmarshal(whole, &content); err != nil {
		return nil, errors.New("JIT config: it is not a JSON map of files")
	}
	return content, nil
}

// newRunner reads the config. Its errors do not quote it: it is a secret.
func newRunner(jit string, out io.Writer) (*runner, error) {
	content, err := Unpack(jit)
	if err != nil {
		return nil, err
	}
	r := &runner{out: out, http: &http.Client{}}
	var parameters struct{ D, Exponent, Modulus, P, Q []byte }
	for name, into := range map[string]any{
		".runner": &r.files.runner, ".credentials": &r.files.credentials, ".credentials_rsaparams": &parameters,
	} {
		if err := json.Unmarshal(content[name], into); err != nil {
			return nil, fmt.Errorf("JIT config: %s is missing or is not JSON", name)
		}
	}
	number := func(b []byte) *big.Int { return new(big.Int).SetBytes(b) }
	exponent := number(parameters.Exponent)
	if !exponent.IsInt64() || exponent.Int64() > 1<<31-1 {
		return nil, errors.New("JIT config: its key is broken")
	}
	r.files.key = &rsa.PrivateKey{
		PublicKey: rsa.PublicKey{N: number(parameters.Modulus), E: int(exponent.Int64())},
		D:         number(parameters.D), Primes: []*big.Int{number(parameters.P), number(parameters.Q)},
	}
	if err := r.files.key.Validate(); err != nil {
		return nil, errors.New("JIT config: its key is broken")
	}
	r.files.key.Precompute()
	return r, nil
}

// assertion is the runner's proof that it has the key: PS256, five minutes.
func (f *files) assertion(now time.Time) (string, error) {
	id := f.credentials.Data.ClientID
	signed, err := jwt.NewWithClaims(jwt.SigningMethodPS256, jwt.RegisteredClaims{
		Subject: id, Issuer: id, Audience: jwt.ClaimStrings{f.credentials.Data.AuthorizationURL},
		NotBefore: jwt.NewNumericDate(now.Add(-30 * time.Second)), IssuedAt: jwt.NewNumericDate(now),
		ExpiresAt: jwt.NewNumericDate(now.Add(5 * time.Minute)),
	}).SignedString(f.key)
	if err != nil {
		return "", fmt.Errorf("sign with the config's key: %w", err)
	}
	return signed, nil
}
