-- Which types of critical error arrived in the last five minutes? Any row is a reason to wake someone.
-- By arrival, since what an outage held back would never show up by its own time. What is muted is left out.
SELECT
    error_type,
    SUM(occurrences)::bigint AS occurrences,
    COUNT(DISTINCT thread_id) AS threads,
    MIN(created_at) AS first_seen,
    MAX(COALESCE(last_seen_at, created_at)) AS last_seen,
    (ARRAY_AGG(error_message ORDER BY created_at DESC, id DESC))[1] AS last_message
FROM system_errors
WHERE
    severity = 'critical'
    AND resolved_at IS NULL
    AND recorded_at >= now() - interval '5 minutes'
    AND NOT EXISTS (
        SELECT FROM system_error_groups AS muted
        WHERE
            muted.fingerprint = system_errors.fingerprint
            AND muted.status = 'muted'
            AND (muted.muted_until IS NULL OR muted.muted_until > now())
    )
GROUP BY error_type
ORDER BY occurrences DESC, error_type;
