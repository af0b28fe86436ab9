-- ledger compares a replica's ledger with the copy here and answers {version, body} of
-- what is here afterwards, the body only if it is not the replica's. ARGV: version,
-- body ('' to ask only), and 1 to write only over the version just before; without
-- that any older version is replaced (an emptied store has version 0).
local version, body, exactly = tonumber(ARGV[3]), ARGV[4], ARGV[5] == '1'
local have = tonumber(redis.call('HGET', ledger, 'version') or '0')
if body ~= '' and have < version and (not exactly or have == version - 1) then
	redis.call('HSET', ledger, 'version', ARGV[3], 'body', body)
	redis.call('PUBLISH', channel, 'ledger')
	return {ARGV[3], ''}
end
if have < version or (have == version and not exactly) then return {whole(have), ''} end
return {whole(have), redis.call('HGET', ledger, 'body') or ''}
