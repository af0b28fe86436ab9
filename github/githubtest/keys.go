package githubtest

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"sync"
	"time"
)

// keyBits is the size of RSA keys here: the least that is taken for safe, since making
// them costs the most time of New.
const keyBits = 2048

// appKey is the App's key, made once per process.
var appKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, keyBits) })

// runnerRSA is the key in every runner's credentials, made once per process: GitHub makes
// one for each, which would cost a tenth of a second of CPU per runner. Runners are told
// apart by their client ids.
var runnerRSA = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, keyBits) })

// PrivateKey is the App's key in PEM, as GitHub lets one download it.
func (g *GitHub) PrivateKey() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(g.appKey)})
}

// rsaParameters is an RSA key as .NET writes it: big-endian numbers in base64.
type rsaParameters struct {
	D        []byte `json:"d"`
	DP       []byte `json:"dp"`
	DQ       []byte `json:"dq"`
	Exponent []byte `json:"exponent"`
	InverseQ []byte `json:"inverseQ"`
	Modulus  []byte `json:"modulus"`
	P        []byte `json:"p"`
	Q        []byte `json:"q"`
}

// jitConfig writes what POST …/generate-jitconfig answers: base64 of a JSON map from
// file name to base64 content, the three files that a configured runner has on disk.
func (g *GitHub) jitConfig(r *runner, base string) (string, error) {
	key, err := runnerRSA()
	if err != nil {
		return "", fmt.Errorf("make a runner's key: %w", err)
	}
	files := map[string]any{
		".runner": map[string]string{
			"AgentId": fmt.Sprint(r.id), "AgentName": r.name, "PoolId": fmt.Sprint(r.group), "PoolName": "Default",
			"DisableUpdate": "True", "Ephemeral": "True", "WorkFolder": "_work",
			"ServerUrl": base + tenantPath, "ServerUrlV2": base + brokerPath, "UseV2Flow": "True",
			"GitHubUrl": base + "/" + string(r.scope),
		},
		".credentials": map[string]any{
			"Scheme": "OAuth",
			"Data": map[string]string{
				"ClientId": r.client, "AuthorizationUrl": base + tokenPath, "RequireFipsCryptography": "True",
			},
		},
		".credentials_rsaparams": rsaParameters{
			D: key.D.Bytes(), P: key.Primes[0].Bytes(), Q: key.Primes[1].Bytes(),
			DP: key.Precomputed.Dp.Bytes(), DQ: key.Precomputed.Dq.Bytes(), InverseQ: key.Precomputed.Qinv.Bytes(),
			Modulus: key.N.Bytes(), Exponent: big.NewInt(int64(key.E)).Bytes(),
		},
	}
	encoded := map[string][]byte{}
	for name, content := range files {
		if encoded[name], err = json.Marshal(content); err != nil {
			return "", fmt.Errorf("write %s: %w", name, err)
		}
	}
	whole, err := json.Marshal(encoded)
	if err != nil {
		return "", fmt.Errorf("write the JIT config: %w", err)
	}
	return base64.StdEncoding.EncodeToString(whole), nil
}

// secret draws a random token of 160 bits.
func secret(prefix string) string {
	var b [20]byte
	rand.Read(b[:]) // never fails
	return prefix + hex.EncodeToString(b[:])
}

// gregorian is the number of 100 ns intervals between the start of the Gregorian
// calendar, from which UUIDs of version 1 count, and the Unix epoch.
const gregorian = 0x01B21DD213814000

// newUUID draws a UUID of version 1, the kind that GitHub gives deliveries: it carries the time.
func newUUID(at time.Time) string {
	ticks := uint64(at.UnixNano()/100) + gregorian
	var b [16]byte
	rand.Read(b[8:]) // never fails
	binary.BigEndian.PutUint32(b[0:], uint32(ticks))
	binary.BigEndian.PutUint16(b[4:], uint16(ticks>>32))
	binary.BigEndian.PutUint16(b[6:], uint16(ticks>>48)&0x0fff|0x1000)
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}
