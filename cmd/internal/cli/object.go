package cli

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"
)

// maxSecret bounds the file that a secret is read from, in bytes.
const maxSecret = 1 << 20

// secrets are the values of --object, which is given once for each: the data of
// secrets by their ids. It is a pflag.Value, so that each is made, or refused,
// as its option is read.
type secrets struct {
	byID map[string][]byte
	out  io.Writer // for the help
}

func (s *secrets) String() string { return "" }

func (s *secrets) Type() string { return "object" }

// Set makes the object that an argument describes.
func (s *secrets) Set(arg string) error {
	var props map[string]string
	var err error
	if strings.HasPrefix(arg, "{") {
		props, err = objectJSON(arg)
	} else {
		var help bool
		if props, help, err = objectKeyval(arg); help {
			s.help(props)
			return exit(exitOK)
		}
	}
	if err != nil {
		return err
	}
	return s.add(props)
}

func (s *secrets) help(props map[string]string) {
	if props["qom-type"] != "secret" {
		io.WriteString(s.out, "List of user creatable objects:\n  secret\n")
		return
	}
	io.WriteString(s.out, "secret options:\n  data=<string>\n  file=<string>\n  format=<QCryptoSecretFormat>\n"+
		"  iv=<string>\n  keyid=<string>\n")
}

// lookup returns the data of a secret.
func (s *secrets) lookup(id string) ([]byte, error) {
	if s != nil {
		if data, ok := s.byID[id]; ok {
			return data, nil
		}
	}
	return nil, messagef("No secret with id '%s'", id)
}

// passphrase returns the secret that encrypt.key-secret names.
func (s *secrets) passphrase(id string) ([]byte, error) {
	if id == "" {
		return nil, messagef("Parameter 'encrypt.key-secret' is required for cipher")
	}
	data, err := s.lookup(id)
	if err != nil {
		return nil, err
	}
	if !utf8.Valid(data) || bytes.IndexByte(data, 0) >= 0 {
		return nil, messagef("Data from secret %s is not valid UTF-8", id)
	}
	return append([]byte{}, data...), nil // an empty one is not nil
}

// objectKeyval reads TYPE,NAME=VALUE,... in which ",," is a comma.
func objectKeyval(arg string) (props map[string]string, help bool, err error) {
	props = map[string]string{}
	for first := true; arg != ""; first = false {
		i := strings.IndexAny(arg, "=,")
		if i < 0 {
			i = len(arg)
		}
		name, rest := arg[:i], arg[i:]
		bare := i > 0 && !strings.HasPrefix(rest, "=")
		switch {
		case bare && (name == "help" || name == "?"):
			help, arg = true, strings.TrimPrefix(rest, ",")
			continue
		case bare && first:
			props["qom-type"], arg = name, strings.TrimPrefix(rest, ",")
			continue
		case name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "":
			return nil, false, messagef("Invalid parameter '%s'", name)
		case bare:
			return nil, false, messagef("Expected '=' after parameter '%s'", name)
		}
		props[name], arg = optionValue(rest[1:])
	}
	return props, help, nil
}

func objectJSON(arg string) (map[string]string, error) {
	var values map[string]any
	if err := json.NewDecoder(strings.NewReader(arg)).Decode(&values); err != nil {
		return nil, jsonError(err)
	}
	props := map[string]string{}
	for name, v := range values {
		s, ok := v.(string)
		if !ok {
			return nil, messagef("Invalid parameter type for '%s', expected: string", name)
		}
		props[name] = s
	}
	return props, nil
}

// add checks the properties in QEMU's order and adds the object.
func (s *secrets) add(props map[string]string) error {
	qomType, ok := props["qom-type"]
	if !ok {
		return messagef("Parameter 'qom-type' is missing")
	}
	if qomType != "secret" {
		return notAccepted("qom-type", qomType)
	}
	id, ok := props["id"]
	if !ok {
		return messagef("Parameter 'id' is missing")
	}
	if f, ok := props["format"]; ok && f != "raw" && f != "base64" {
		return notAccepted("format", f)
	}
	known := []string{"qom-type", "id", "format", "keyid", "iv", "data", "file"}
	for _, name := range qdictOrder(props) {
		if !slices.Contains(known, name) {
			return messagef("Parameter '%s' is unexpected", name)
		}
	}
	if !wellFormedID(id) {
		return badID("id")
	}
	if _, twice := s.byID[id]; twice {
		return messagef("attempt to add duplicate property '%s' to object (type 'container')", id)
	}
	data, err := secretData(props)
	if err != nil {
		return err
	}
	if _, ok := props["keyid"]; ok {
		data, err = s.decrypt(data, props)
	} else if props["format"] == "base64" {
		data, err = decodeBase64(data)
	}
	if err != nil {
		return err
	}
	if s.byID == nil {
		s.byID = map[string][]byte{}
	}
	s.byID[id] = data
	return nil
}

func badID(name string) error {
	return withHint(messagef("Parameter '%s' expects an identifier", name),
		"Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.\n")
}

// wellFormedID reports whether QEMU takes a string for an id.
func wellFormedID(id string) bool {
	for i, c := range []byte(id) {
		letter := 'a' <= c|0x20 && c|0x20 <= 'z'
		if !letter && (i == 0 || !isDecimal(c) && !strings.ContainsRune("-._", rune(c))) {
			return false
		}
	}
	return id != ""
}

// secretData returns what a secret is made of.
func secretData(props map[string]string) ([]byte, error) {
	data, hasData := props["data"]
	name, hasFile := props["file"]
	switch {
	case hasData && hasFile:
		return nil, messagef("'file' and 'data' are mutually exclusive")
	case hasData:
		return []byte(data), nil
	case !hasFile:
		return nil, messagef("Either 'file' or 'data' must be provided")
	}
	f, err := os.Open(name)
	if err != nil {
		if errno := syscall.Errno(0); errors.As(err, &errno) {
			return nil, messagef("Unable to read %s: Failed to open file “%s”: %s", name, name, strerror(errno))
		}
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err == nil && len(b) > maxSecret {
		err = fmt.Errorf("more than %d bytes", maxSecret)
	}
	if err != nil {
		return nil, messagef("Unable to read %s: %w", name, err)
	}
	return b, nil
}

// decrypt decrypts a secret (AES-256 in CBC mode, padded as PKCS #7 has it) by
// another one.
func (s *secrets) decrypt(data []byte, props map[string]string) ([]byte, error) {
	key, err := s.lookup(props["keyid"])
	if err != nil {
		return nil, err
	}
	if len(key) != 32 {
		return nil, messagef("Key should be 32 bytes in length")
	}
	if _, ok := props["iv"]; !ok {
		return nil, messagef("IV is required to decrypt secret")
	}
	iv, err := decodeBase64([]byte(props["iv"]))
	if err != nil {
		return nil, err
	}
	if len(iv) != aes.BlockSize {
		return nil, messagef("IV should be 16 bytes in length not %d", len(iv))
	}
	if props["format"] == "base64" {
		if data, err = decodeBase64(data); err != nil {
			return nil, err
		}
	}
	if len(data) == 0 || len(data)%aes.BlockSize != 0 {
		return nil, messagef("Length %d must be a multiple of block size %d", len(data), aes.BlockSize)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	plain := make([]byte, len(data))
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(plain, data)
	pad := int(plain[len(plain)-1])
	if pad > aes.BlockSize {
		return nil, messagef("Incorrect number of padding bytes (%d) found on decrypted data", pad)
	}
	return plain[:len(plain)-pad], nil
}

// decodeBase64 decodes as much as there is in whole groups.
func decodeBase64(b []byte) ([]byte, error) {
	if strings.Trim(string(b), "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n") != "" {
		return nil, messagef("Base64 data contains invalid characters")
	}
	out := make([]byte, base64.StdEncoding.DecodedLen(len(b)))
	n, _ := base64.StdEncoding.Decode(out, b)
	return out[:n], nil
}
