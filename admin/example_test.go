package admin_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
)

// A key is made together with what else belongs to it, or not at all. It is shown
// once.
func ExampleKeys_Create() {
	ctx := context.Background()
	var pool *pgxpool.Pool // the service's own
	var shown string
	err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		info, secret, err := admin.NewKeys(tx).Create(ctx, "org_1", admin.NewKey{Name: "CI"})
		if err != nil {
			return err
		}
		shown = secret.Reveal()
		_, err = tx.Exec(ctx, `INSERT INTO audit (what, key_id) VALUES ('created', $1)`, info.ID)
		return err
	})
	switch {
	case errors.Is(err, admin.ErrKeyLimit):
		fmt.Println("delete some keys first")
	case err != nil:
		log.Fatal(err)
	}
	fmt.Println(shown)
}

// The old key lives on for a day, so that clients can change over.
func ExampleKeys_Rotate() {
	ctx := context.Background()
	var pool *pgxpool.Pool // the service's own
	_, secret, err := admin.NewKeys(pool).Rotate(ctx, "org_1", "the id of the old key", time.Now().Add(24*time.Hour), admin.NewKey{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(secret.Reveal())
}

func ExampleKeys_List() {
	ctx := context.Background()
	var pool *pgxpool.Pool // the service's own
	keys := admin.NewKeys(pool)
	for page := (admin.Page{Limit: 100}); ; {
		list, next, err := keys.List(ctx, "org_1", page)
		if err != nil {
			log.Fatal(err)
		}
		for _, k := range list {
			fmt.Println(k.ID, k.Hint, k.State(time.Now()))
		}
		if page.After = next; next == "" {
			break
		}
	}
}

// What billing does when an invoice is paid.
func ExamplePlans_Subscribe() {
	ctx := context.Background()
	var pool *pgxpool.Pool // billing's own
	plans := admin.NewPlans(pool)
	if err := plans.Subscribe(ctx, "org_1", "starter", apikey.PlanActive, time.Now().AddDate(0, 1, 0)); err != nil {
		log.Fatal(err)
	}
}
